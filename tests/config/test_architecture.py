import ast
import dataclasses
import importlib
import inspect
import pkgutil
import sys

import pytest

import flowrl.losses
import flowrl.samplers

PURE = {"torch", "jaxtyping", "flowrl.bounds", "flowrl.errors", "flowrl.types", *sys.stdlib_module_names}
MODULES = [
    importlib.import_module(f"{package.__name__}.{info.name}")
    for package in (flowrl.samplers, flowrl.losses)
    for info in pkgutil.iter_modules(package.__path__)
]


def sources(root):
    """Python files of the product by path relative to the root."""
    paths = [*root.glob("flowrl/**/*.py"), *root.glob("scripts/**/*.py"), root / "train.py"]
    return {str(path.relative_to(root)): path.read_text() for path in sorted(paths)}


def imports(text):
    """Dotted names of all imported modules, also those imported inside functions."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from flowrl import x` imports flowrl.x.
            is_package = node.module == "flowrl"
            names |= {f"flowrl.{alias.name}" for alias in node.names} if is_package else {node.module or "."}
    return names


def strangers(name, allowed):
    return not any(name == known or name.startswith(f"{known}.") for known in allowed)


def importers(root, package):
    return {path for path, text in sources(root).items() if any(not strangers(n, {package}) for n in imports(text))}


@pytest.mark.parametrize(
    ("pattern", "own"),
    [
        ("types.py", ()),
        ("bounds.py", ("annotated_types",)),
        ("schedule.py", ()),
        ("gaussian.py", ()),
        ("samplers/*.py", ("flowrl.gaussian", "flowrl.schedule", "flowrl.samplers")),
        ("rollout.py", ("flowrl.gaussian", "flowrl.schedule", "flowrl.samplers")),
        ("advantages.py", ()),
        ("diagnostics.py", ()),
        ("losses/*.py", ("flowrl.losses",)),
        ("losses/reference.py", ("flowrl.gaussian", "flowrl.schedule")),
        ("batch_plan.py", ()),
        ("ema.py", ()),
        ("metrics.py", ()),
        ("panel.py", ()),
        ("statistics.py", ("numpy", "scipy")),
        ("page.py", ()),
        (
            "report/*.py",
            (
                "flowrl.report",
                "flowrl.page",
                "flowrl.statistics",
                "flowrl.metrics",
                "flowrl.runs.files",
                "flowrl.runs.metrics",
                "numpy",
                "yaml",
            ),
        ),
        ("shapes/*.py", ("flowrl.shapes", "numpy", "scipy")),
    ],
)
def test_dependencies_point_down(root, pattern, own):
    """Mutation: import a sampler in a loss, or anything else against the direction."""
    paths = [path for path in (root / "flowrl").glob(pattern) if path.stem != "reference" or "reference" in pattern]
    assert paths
    for path in paths:
        odd = {name for name in imports(path.read_text()) if strangers(name, PURE | set(own))}
        assert not odd, f"{path} imports {odd}"


def test_sweeps_know_nothing_of_the_launch(root):
    """The launch starts sweeps, not the other way. Mutation: take a name of flowrl.launch into flowrl.sweep."""
    assert not {path for path in importers(root, "flowrl.launch") if path.startswith(("flowrl/sweep/", "flowrl/runs/"))}


def test_hydra_stays_at_the_door(root):
    """Mutation: read a DictConfig inside the package."""
    allowed = ("train.py", "scripts/", "flowrl/launch/")
    found = importers(root, "hydra") | importers(root, "omegaconf")
    assert "flowrl/launch/run.py" in found
    assert {path for path in found if not path.startswith(allowed)} == set()


def test_lightning_stays_in_modules_data_and_callbacks(root):
    """Mutation: import lightning in a loss or a model."""
    allowed = ("flowrl/modules/", "flowrl/data.py", "flowrl/callbacks/", "flowrl/launch/", "flowrl/trackers.py")
    found = importers(root, "lightning")
    assert found
    assert {path for path in found if not path.startswith((*allowed, "scripts/"))} == set()


def test_no_drawer_for_odds_and_ends(root):
    """Mutation: add flowrl/utils.py."""
    names = {"utils", "util", "common", "helpers", "helper", "registry", "misc"}
    assert not [path for path in (root / "flowrl").rglob("*") if path.stem in names]


def test_files_stay_small(root):
    """Mutation: let a file pass 300 lines, or train.py 60."""
    lengths = {path: len(text.splitlines()) for path, text in sources(root).items() if not path.startswith("scripts/")}
    assert {path: n for path, n in lengths.items() if n > (60 if path == "train.py" else 300)} == {}


def test_scientific_numbers_have_no_python_default():
    """Their one home is the YAML. Mutation: `noise_level: float = 0.7`."""
    checked = 0
    for module in MODULES:
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        for value in own:
            if dataclasses.is_dataclass(value):
                checked += 1
                for field in dataclasses.fields(value):
                    name = f"{value.__name__}.{field.name}"
                    assert field.kw_only, name
                    assert field.default is field.default_factory is dataclasses.MISSING, name
            elif inspect.isfunction(value) and module.__name__.startswith("flowrl.losses"):
                checked += 1
                inputs, *options = inspect.signature(value).parameters.values()
                assert inputs.default is inputs.empty
                assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in options), value.__name__
    assert checked >= 9
