"""The keys that resumed runs have otherwise than before, as a run's record keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowrl.runs.files import damaged


@dataclass(frozen=True)
class Change:
    """A key that a resumed run has otherwise than before, both values as texts, and the number of
    iterations that were done by then.
    """

    key: str
    before: str
    after: str
    iteration: int = 0

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def read_changes(record: Mapping[str, Any], path: Path) -> list[Change]:
    """Return the changes that a run's record at `path` keeps. Raises UserError where they are no
    changes.
    """
    try:
        return [Change(**entry) for entry in record.get("changes", ())]
    except TypeError as error:
        raise damaged(path, error, "restore it, or delete its changes") from error


def with_changes(
    earlier: Sequence[Change], changes: Sequence[Change], num_iterations: int
) -> list[dict[str, Any]]:
    """Return all changes of a run that goes on after `num_iterations`, ready for its record.

    Changes made there or later belong to iterations that are done again, so they are merged with
    the new ones: one change a key, and none where the first value is back.
    """
    lasting = [change for change in earlier if change.iteration < num_iterations]
    undone = [change for change in earlier if change.iteration >= num_iterations]
    merged: dict[str, Change] = {}
    for change in (*undone, *changes):
        # Several changes of a key become one, from its first value to its last.
        first = merged.get(change.key, change)
        merged[change.key] = Change(change.key, first.before, change.after, num_iterations)
    kept = []
    for change in merged.values():
        # Before the first iteration nothing was done under the earlier value.
        if num_iterations and change.before != change.after:
            kept.append(change)
    return [asdict(change) for change in (*lasting, *kept)]
