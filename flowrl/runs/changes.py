"""The keys that resumed runs have otherwise than before, as a run's record keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    earlier: Iterable[Change], changes: Iterable[Change], iteration: int
) -> list[dict[str, Any]]:
    """Return all changes of a run that goes on after `iteration`, ready for its record.

    What was changed at that place or beyond it, where iterations are done again, and has another
    value now, or its first one again, is one change or none.
    """
    lasting = [change for change in earlier if change.iteration < iteration]
    latest: dict[str, Change] = {}
    for change in (*earlier, *changes):
        if change in lasting:
            continue
        # Several changes of a key become one, from its first value to its last.
        first = latest.get(change.key, change)
        latest[change.key] = Change(change.key, first.before, change.after, iteration)
    kept = []
    for change in latest.values():
        # Before the first iteration nothing was done with the earlier value.
        if iteration and change.before != change.after:
            kept.append(change)
    return [asdict(change) for change in (*lasting, *kept)]
