"""The jobs that the command line of a sweep stands for, so that they can be checked before any
runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import IntervalSweep, Override

from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.launch.foreign_targets import parse

BASIC = f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"
"""Hydra's own sweeper, which runs all combinations."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """The overrides of each job. `sweeper` is the class of one that draws its jobs as it goes, and
    empty for Hydra's own, whose jobs are known.
    """

    overrides: list[list[str]]
    sweeper: str = ""


def jobs_of(words: Sequence[str], added: Sequence[str] = ()) -> Jobs:
    """Return the jobs of a sweep over `words` and its sweeper's own `params`, as Hydra divides
    them; `added` are further overrides of all, which are left to the caller.

    Of a search, whose jobs nobody knows yet, they are its corners one at a time: each range at its
    first value, and each of its other values, of an interval the other end, with the others at
    their first. Raises UserError for a search that has no ranges that could be read.
    """
    first = [_values(item)[0] for item in parse(words)]
    sweeper: Any = compose(["name=check", *first, *added], with_hydra=True).hydra.sweeper
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    items = parse([*params, *words])
    name = str(sweeper._target_)
    if name == BASIC:
        (jobs,) = BasicSweeper.split_arguments(items, None)
        return Jobs([list(job) for job in jobs])
    if not any(item.is_sweep_override() for item in items):
        raise UserError(
            f"-m: {name} has no ranges in hydra.sweeper.params or here that could be checked; "
            "check one job, without -m"
        )
    return Jobs(_corners(items), name.rpartition(".")[2])


def _corners(items: Iterable[Override]) -> list[list[str]]:
    """Return the overrides with each range at its first value, then each other value alone."""
    # The last of a key counts, as what is typed does before a sweeper's own.
    values = {item.get_key_element(): _values(item) for item in items}
    first = {key: several[0] for key, several in values.items()}
    jobs = [list(first.values())]
    for key, several in values.items():
        jobs += [list((first | {key: value}).values()) for value in several[1:]]
    return jobs


def _values(item: Override) -> list[str]:
    """Return the overrides that one stands for: of an interval its ends."""
    key = item.get_key_element()
    if not item.is_sweep_override():
        return [str(item.input_line)]
    if item.is_interval_sweep():
        interval = item.value()
        assert isinstance(interval, IntervalSweep)
        return [f"{key}={interval.start}", f"{key}={interval.end}"]
    return [f"{key}={value}" for value in item.sweep_string_iterator()]
