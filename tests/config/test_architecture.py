import ast
import dataclasses
import importlib
import inspect
import pkgutil
import sys

import pytest

import flowrl.losses
import flowrl.samplers

PURE = {"torch", "jaxtyping", *sys.stdlib_module_names}
LEARNING = ("diffusers", "huggingface_hub", "open_clip", "peft", "safetensors", "transformers")
ROOMS = {
    # The hall: the mathematics, which sees torch and what stands before it.
    "errors": (),
    "types": (),
    "statistics": ("numpy", "scipy"),
    "schedule": ("errors", "values"),
    "gaussian": ("errors", "types", "values"),
    "noise": ("numpy",),
    "advantages": ("errors", "values"),
    "diagnostics": ("losses.ratio", "types", "values"),
    "samplers": ("errors", "gaussian", "schedule", "values"),
    "losses": ("errors", "gaussian", "schedule", "types", "values"),
    "rollout": ("gaussian", "samplers", "schedule", "types"),
    "algorithm": (
        "advantages",
        "diagnostics",
        "errors",
        "gaussian",
        "losses",
        "samplers",
        "schedule",
        "types",
        "values",
    ),
    # The rooms, each after those that it may know.
    "values": ("errors", "annotated_types", "pydantic", "pydantic_core"),
    "shapes": ("errors", "numpy", "scipy"),
    "images": ("errors", "numpy", "PIL"),
    "prompts": (
        *("errors", "flowrl.DISTRIBUTION", "images", "shapes", "types", "values"),
        *("annotated_types", "datasets", "numpy", "PIL"),
    ),
    "runs": ("flowrl.__version__", "errors", "parallel", "types", "yaml", *LEARNING),
    "models": (
        *("errors", "images", "parallel.launcher", "runs.files", "schedule", "types", "values"),
        *("httpx", "numpy", "PIL", *LEARNING),
    ),
    "tuning": (
        *(
            "errors",
            "flowrl.__version__",
            "models.experts",
            "models.quantization",
            "models.weights",
        ),
        *("parallel", "runs", "values"),
        *LEARNING,
    ),
    "parallel": ("errors", "values", "lightning"),
    "votes": ("errors", "runs.files", "types", "values", "PIL"),
    "rewards": (
        *(
            "votes",
            "advantages",
            "errors",
            "images",
            "models.hub",
            "models.weights",
            "runs.files",
            "shapes",
            "types",
            "values",
        ),
        *(
            "annotated_types",
            "httpx",
            "numpy",
            "PIL",
            "pydantic_core",
            "rapidocr",
            "scipy",
            "torchvision",
            *LEARNING,
        ),
    ),
    "objectives": (
        *("algorithm", "diagnostics", "errors", "gaussian", "losses", "noise", "rollout"),
        *("runs.glossary", "samplers", "schedule", "tuning", "types"),
    ),
    "training": (
        *(
            "advantages",
            "algorithm",
            "diagnostics",
            "errors",
            "gaussian",
            "images",
            "losses",
            "models",
            "noise",
            "objectives",
            "PIL",
            "bitsandbytes",
        ),
        *(
            "parallel",
            "rewards",
            "rollout",
            "runs",
            "samplers",
            "schedule",
            "tuning",
            "types",
            "values",
            "lightning",
        ),
    ),
    "speed": ("errors", "parallel", "rewards", "training"),
    "report": (
        "errors",
        *("runs.changes", "runs.description", "runs.files", "runs.folder", "runs.glossary"),
        *("runs.metrics", "statistics"),
        "values.plural",
        *("jinja2", "markupsafe", "numpy"),
    ),
    "evaluation": (
        *(
            "errors",
            "gaussian",
            "images",
            "models",
            "noise",
            "parallel",
            "prompts",
            "report",
            "rewards",
            "runs",
            "samplers",
        ),
        *(
            "schedule",
            "statistics",
            "training",
            "tuning",
            "types",
            "values",
            "numpy",
            "PIL",
            "scipy",
            *LEARNING,
        ),
    ),
    "callbacks": (
        *(
            "errors",
            "evaluation",
            "images",
            "models.backend",
            "models.derived",
            "models.weights",
            "objectives.gate",
            "objectives.micro_batch",  # the rehearsal makes one
            "parallel",
            "prompts",
            "rewards.images",
            "rewards.routed",
            "rewards.votes",
            "runs",
            "speed",
            "statistics",
            "training",
        ),
        *(
            "tuning",
            "types",
            "values",
            "votes",
            "httpx",
            "lightning",
            "numpy",
            "PIL",
            "wandb",
            *LEARNING,
        ),
    ),
    "serving": (
        *("errors", "parallel", "rewards", "runs.files", "training", "types", "values", "votes"),
        *("prometheus_client", "starlette", "uvicorn"),
    ),
    "sweep": ("errors", "runs", "values"),
    "sharing": (
        *("errors", "flowrl.DISTRIBUTION", "flowrl.__version__", "report", "runs", "tuning"),
        *("values", "huggingface_hub", "jinja2", "yaml"),
    ),
    # The programs, above all rooms.
    "cli": (
        *("algorithm", "errors", "evaluation", "images", "launch", "losses", "models", "noise"),
        *("objectives", "parallel", "prompts", "report", "rewards", "runs", "serving", "sharing"),
        *(
            "samplers",
            "schedule",
            "studies",
            "sweep",
            "training",
            "tuning",
            "types",
            "values",
            "votes",
        ),
        *("flowrl.DISTRIBUTION", "diffusers", "hydra", "jinja2", "omegaconf", "PIL"),
    ),
    # What a notebook imports, above all rooms too.
    "api": (
        *("errors", "evaluation", "images", "launch", "losses", "models", "prompts", "rewards"),
        *("runs", "training", "tuning", "types"),
        *("hydra", "lightning", "omegaconf", "PIL"),
    ),
    "__main__": ("flowrl.__version__", "cli", "errors", "launch.program", "values.wording"),
}
"""What each module of the hall and each room may import: names of FlowRL's own, then packages
beside torch.
"""
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
            names |= (
                {f"flowrl.{alias.name}" for alias in node.names}
                if is_package
                else {node.module or "."}
            )
    return names


def strangers(name, allowed):
    return not any(name == known or name.startswith(f"{known}.") for known in allowed)


def importers(root, package):
    return {
        path
        for path, text in sources(root).items()
        if any(not strangers(n, {package}) for n in imports(text))
    }


@pytest.mark.parametrize("room", ROOMS)
def test_dependencies_point_down(root, room):
    """Mutation: import a sampler in a loss, or anything else against the direction."""
    place = root / "flowrl" / room
    paths = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert paths
    names = {path.stem for path in (root / "flowrl").iterdir()}
    allowed = {
        f"flowrl.{name}" if name.split(".")[0] in names else name for name in (room, *ROOMS[room])
    }
    for path in paths:
        odd = {name for name in imports(path.read_text()) if strangers(name, PURE | allowed)}
        assert not odd, f"{path} imports {odd}"


def test_every_room_has_its_directions(root):
    """Mutation: add a room, or a module to the hall, and say nothing of what it may import."""
    free = {"__init__", "__pycache__", "launch", "py", "studies"}
    assert {path.stem for path in (root / "flowrl").iterdir()} - free == set(ROOMS)


def test_hydra_stays_at_the_door(root):
    """Mutation: read a DictConfig inside the package."""
    allowed = ("train.py", "scripts/", "flowrl/api/", "flowrl/cli/", "flowrl/launch/")
    found = importers(root, "hydra") | importers(root, "omegaconf")
    assert "flowrl/launch/run.py" in found
    assert {path for path in found if not path.startswith(allowed)} == set()


def test_lightning_stays_around_training(root):
    """Mutation: import lightning in a loss or a model."""
    rooms = ("api", "callbacks", "launch", "parallel", "training")
    allowed = tuple(f"flowrl/{room}/" for room in rooms)
    found = importers(root, "lightning")
    assert found
    assert {path for path in found if not path.startswith((*allowed, "scripts/"))} == set()


def test_no_drawer_for_odds_and_ends(root):
    """Mutation: add flowrl/utils.py."""
    names = {"utils", "util", "common", "helpers", "helper", "registry", "misc"}
    assert not [path for path in (root / "flowrl").rglob("*") if path.stem in names]


def test_files_stay_small(root):
    """Mutation: let a file pass 400 lines, or train.py 60."""
    lengths = {
        path: len(text.splitlines())
        for path, text in sources(root).items()
        if not path.startswith("scripts/")
    }
    assert {path: n for path, n in lengths.items() if n > (60 if path == "train.py" else 400)} == {}


def test_scientific_numbers_have_no_python_default():
    """Their one home is the YAML. Mutation: `noise_level: float = 0.7`."""
    checked = 0
    for module in MODULES:
        own = [
            value
            for value in vars(module).values()
            if getattr(value, "__module__", None) == module.__name__
        ]
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
                assert all(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in options), (
                    value.__name__
                )
    assert checked >= 9
