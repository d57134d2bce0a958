"""The runs of a study: `sweep.yaml`, expanded to lists of overrides for train.py.

A study has stages, one after the other. A stage runs each of its methods, in each of its variants,
with each of its seeds. A stage that `chooses` by a metric tunes: the best variant of each method is
what later stages, and other studies, take under `tuned`. The `quick` section reduces all of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.runs.files import read_yaml
from flowrl.values.wording import meant

Overrides = tuple[str, ...]
Section = Mapping[str, Any]
"""A section of a sweep.yaml, as it stands there."""

SWEEP = "sweep.yaml"
RESTORE = "restore it from the repository"
ORDER = (
    "methods",
    "ratio_noise",
    "delta",
    "hard",
    "reuse",
    "forgetting",
    "multi_reward",
    "published",
    "field",
)
"""All studies, the one that tunes first."""


@dataclass(frozen=True)
class Planned:
    """One run to be: a method of a stage, in a variant, with a seed."""

    stage: str
    method: str
    variant: str
    seed: int
    overrides: Overrides

    @property
    def condition(self) -> str:
        """The method and the variant, alike in all runs that differ by their seed alone."""
        return f"{self.method} {self.variant}".strip()


@dataclass(frozen=True)
class Stage:
    """A stage of a study: every method in every one of its variants, with every seed.

    `common` are the overrides of all its runs; `methods` and `variants` add theirs, the latter by
    method and then by name, `{"": ()}` where a method has one. `chooses` names the metric by which
    the stage tunes, `tuned` the study whose choices its methods take; empty texts say that it does
    not. `seconds` is what a run takes, for estimates.
    """

    name: str
    common: Overrides
    seeds: tuple[int, ...]
    methods: Mapping[str, Overrides]
    variants: Mapping[str, Mapping[str, Overrides]]
    chooses: str
    tuned: str
    seconds: float

    def runs(self, chosen: Mapping[str, Overrides]) -> list[Planned]:
        """List all runs, seed by seed, so that a sweep cut short has as many of each; `chosen` are
        tuned overrides by method, which a stage that takes none leaves alone.

        Raises UserError for a method that the stage takes tuned and that is not among `chosen`.
        """
        if self.tuned:
            missing = ", ".join(method for method in self.methods if method not in chosen)
            if missing:
                raise UserError(
                    f"stage {self.name}: study {self.tuned} has tuned no {missing}; run it first"
                )
        runs = []
        for seed in self.seeds:
            for method, overrides in self.methods.items():
                tuned = chosen[method] if self.tuned else ()
                # From the general to the special: of one key the later value stays.
                for variant, changes in self.variants[method].items():
                    every = merge(self.common, overrides, tuned, changes, (f"seed={seed}",))
                    runs.append(Planned(self.name, method, variant, seed, every))
        return runs

    def of(self, methods: Collection[str]) -> Stage:
        """Return the stage with those of its methods alone."""
        kept_methods = {name: self.methods[name] for name in self.methods if name in methods}
        variants = {name: self.variants[name] for name in kept_methods}
        return replace(self, methods=kept_methods, variants=variants)

    @property
    def num_runs(self) -> int:
        """The number of runs, which is known before anything is tuned."""
        return len(self.seeds) * sum(len(variants) for variants in self.variants.values())


@dataclass(frozen=True)
class Study:
    """`report` says what is compared and drawn, `simulation` what is computed without any run."""

    name: str
    stages: Sequence[Stage]
    report: Section
    simulation: Section

    @property
    def num_runs(self) -> int:
        """The number of runs of all stages."""
        return sum(stage.num_runs for stage in self.stages)

    @property
    def hours(self) -> float:
        """The estimated wall time on two cores, a single-threaded run on each."""
        return sum(stage.num_runs * stage.seconds for stage in self.stages) / 2 / 3600


def read(name: str, folder: Path, is_quick: bool) -> Study:
    """Read the study below `folder`. Raises UserError for a name that has no sweep.yaml there."""
    path = folder / name / SWEEP
    if not path.is_file():
        raise UserError(
            f"{name}: no such study{meant(name, ORDER)}; choose one of {', '.join(ORDER)}"
        )
    spec = read_yaml(path, RESTORE)
    reduced: Section = {}
    if is_quick:
        reduced = spec.get("quick", {})
    common = spec.get("common", ())
    # A text names another study, whose common overrides are meant: studies share a setting so.
    if isinstance(common, str):
        common = read_yaml(folder / common / SWEEP, RESTORE)["common"]
    common = merge(common, reduced.get("common", ()))
    reduced_stages = reduced.get("stages", {})
    stages = []
    for stage, planned in spec.get("stages", {}).items():
        stages.append(_stage(stage, common, planned, reduced_stages.get(stage, {})))
    simulation = spec.get("simulation", {}) | reduced.get("simulation", {})
    return Study(name, stages, spec.get("report", {}), simulation)


def _stage(name: str, common: Overrides, spec: Section, reduced: Section) -> Stage:
    """Make a stage of its section of sweep.yaml.

    In `reduced`, lists of names keep those methods and variants; everything else there replaces
    what `spec` says.
    """
    methods = _picked(spec["methods"], reduced.get("methods"))
    variants = _picked(spec.get("variants", {"": ()}), reduced.get("variants"))
    grid = reduced.get("grid", spec.get("grid"))
    # A grid is of one method; variants that are listed by name are those of every method.
    variants_of = {}
    for method in methods:
        variants_of[method] = product(grid[method]) if grid else variants
    return Stage(
        name=name,
        common=merge(common, spec.get("overrides", ()), reduced.get("overrides", ())),
        seeds=tuple(reduced.get("seeds", spec["seeds"])),
        methods=methods,
        variants=variants_of,
        chooses=spec.get("chooses", ""),
        tuned=spec.get("tuned", ""),
        seconds=reduced.get("seconds", spec["seconds"]),
    )


def _picked(
    overrides_of: Mapping[str, Sequence[str]], names: Collection[str] | None
) -> dict[str, Overrides]:
    """Return the overrides under the given names, or under all."""
    chosen = overrides_of if names is None else names
    return {name: tuple(overrides_of[name]) for name in chosen}


def product(grid: Mapping[str, Sequence[Any]]) -> dict[str, Overrides]:
    """Return every combination of the values of some keys, each under a name that tells its
    overrides.
    """
    choices = []
    for key, values in grid.items():
        choices.append([f"{key}={value}" for value in values])
    return {" ".join(row): row for row in itertools.product(*choices)}


def merge(*lists: Sequence[str]) -> Overrides:
    """Join overrides in one list; of those with the same key the last stays, at the place of the
    first.
    """
    last_of: dict[str, str] = {}
    for override in itertools.chain(*lists):
        key = override.split("=", 1)[0]
        # A dictionary keeps the place at which a key first came.
        last_of[key] = override
    return tuple(last_of.values())
