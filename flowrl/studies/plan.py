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
SWEEP = "sweep.yaml"
RESTORE = "restore it from the repository"
ORDER = ("methods", "ratio_noise", "delta", "hard", "reuse", "forgetting", "multi_reward")
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
        """What is alike in all runs that differ by their seed alone."""
        return f"{self.method} {self.variant}".strip()


@dataclass(frozen=True)
class Stage:
    """`variants` holds each method's, `{"": ()}` where there is one. `seconds` is what a run takes,
    for estimates.
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
        """All runs, seed by seed, so that a sweep cut short has as many of each; `chosen` are tuned
        overrides.
        """
        if self.tuned and (missing := [method for method in self.methods if method not in chosen]):
            raise UserError(
                f"stage {self.name}: study {self.tuned} has tuned no {', '.join(missing)}; run it "
                "first"
            )
        return [
            Planned(
                self.name,
                method,
                variant,
                seed,
                merge(
                    self.common,
                    overrides,
                    chosen.get(method, ()) if self.tuned else (),
                    own,
                    (f"seed={seed}",),
                ),
            )
            for seed in self.seeds
            for method, overrides in self.methods.items()
            for variant, own in self.variants[method].items()
        ]

    def of(self, methods: Collection[str]) -> Stage:
        """The stage with those of its methods alone."""
        own = {method: overrides for method, overrides in self.methods.items() if method in methods}
        return replace(
            self, methods=own, variants={method: self.variants[method] for method in own}
        )

    @property
    def num_runs(self) -> int:
        """How many runs there are; known before anything is tuned."""
        return len(self.seeds) * sum(len(variants) for variants in self.variants.values())


@dataclass(frozen=True)
class Study:
    """`report` says what is compared and drawn, `simulation` what is computed without any run."""

    name: str
    stages: Sequence[Stage]
    report: Mapping[str, Any]
    simulation: Mapping[str, Any]

    @property
    def num_runs(self) -> int:
        """Of all stages."""
        return sum(stage.num_runs for stage in self.stages)

    @property
    def hours(self) -> float:
        """Estimated wall time on two cores, a single-threaded run on each."""
        return sum(stage.num_runs * stage.seconds for stage in self.stages) / 2 / 3600


def read(name: str, folder: Path, is_quick: bool) -> Study:
    """The study below `folder`. Raises UserError for a name that has no sweep.yaml there."""
    path = folder / name / SWEEP
    if not path.is_file():
        raise UserError(
            f"{name}: no such study{meant(name, ORDER)}; choose one of {', '.join(ORDER)}"
        )
    spec = read_yaml(path, RESTORE)
    reduced = spec.get("quick", {}) if is_quick else {}
    common = spec.get("common", ())
    if isinstance(common, str):  # those of another study
        common = read_yaml(folder / common / SWEEP, RESTORE)["common"]
    common = merge(common, reduced.get("common", ()))
    stages = [
        _stage(stage, common, given, reduced.get("stages", {}).get(stage, {}))
        for stage, given in spec.get("stages", {}).items()
    ]
    simulation = spec.get("simulation", {}) | reduced.get("simulation", {})
    return Study(name, stages, spec.get("report", {}), simulation)


def _stage(
    name: str, common: Overrides, given: Mapping[str, Any], reduced: Mapping[str, Any]
) -> Stage:
    """In `reduced`, lists of names keep those methods and variants; everything else replaces what
    is given.
    """
    methods = {
        method: given["methods"][method] for method in reduced.get("methods", given["methods"])
    }
    grid = reduced.get("grid", given.get("grid"))
    variants = given.get("variants", {"": ()})
    plain = {variant: variants[variant] for variant in reduced.get("variants", variants)}
    return Stage(
        name=name,
        common=merge(common, given.get("overrides", ()), reduced.get("overrides", ())),
        seeds=tuple(reduced.get("seeds", given["seeds"])),
        methods={method: tuple(overrides) for method, overrides in methods.items()},
        variants={method: product(grid[method]) if grid else _tuples(plain) for method in methods},
        chooses=given.get("chooses", ""),
        tuned=given.get("tuned", ""),
        seconds=reduced.get("seconds", given["seconds"]),
    )


def _tuples(variants: Mapping[str, Sequence[str]]) -> dict[str, Overrides]:
    return {variant: tuple(overrides) for variant, overrides in variants.items()}


def product(grid: Mapping[str, Sequence[Any]]) -> dict[str, Overrides]:
    """Every combination of the values of some keys, each under a name that tells its overrides."""
    rows = itertools.product(
        *([f"{key}={value}" for value in values] for key, values in grid.items())
    )
    return {" ".join(row): row for row in rows}


def merge(*lists: Sequence[str]) -> Overrides:
    """Overrides in one list; of those with the same key the last stays, at the place of the
    first.
    """
    return tuple(
        {override.split("=", 1)[0]: override for own in lists for override in own}.values()
    )
