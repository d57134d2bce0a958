"""The record of which votes were in force at which iteration, by which a resumed run scores as it
would have.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.runs.files import write_whole
from flowrl.votes.files import PICTURES, STATUS, VOTES, Ballot, read_votes, usable_votes

ROUNDS = "votes_used.jsonl"
"""One line an iteration in a run's folder."""


@dataclass(frozen=True)
class Round:
    """The votes that an iteration scored by: the first `num_lines` lines of the list, their
    `digest`, and the number of votes among them that scores were fitted to.
    """

    iteration: int
    num_lines: int
    digest: str
    num_votes: int


def read_rounds(run: Path) -> dict[int, Round]:
    """Read the rounds of a run by their iterations."""
    path = run / ROUNDS
    rounds = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # What stands behind the last line's end was cut off by a kill; the iteration begins anew.
    for line in text.split("\n")[:-1]:
        try:
            round_ = Round(**json.loads(line))
        except (ValueError, TypeError):
            continue
        rounds[round_.iteration] = round_
    return rounds


def votes_of_round(
    run: Path, folder: Path, iteration: int, read: Callable[[Path], Ballot] = read_votes
) -> tuple[Ballot, bool]:
    """Return the votes that an iteration scores by, and whether they were recorded earlier: those
    that `read` finds where it is new, which is recorded, and else those that it had.

    Raises UserError where these, or their pictures, are no longer there as they were.
    """
    rounds = read_rounds(run)
    earlier = rounds.get(iteration)
    if earlier is not None:
        return _same_votes(run, folder, earlier), True
    ballot = read(folder)
    num_votes = len(usable_votes(folder, ballot))
    rounds[iteration] = Round(iteration, ballot.num_lines, ballot.digest, num_votes)
    lines = [json.dumps(asdict(rounds[number])) for number in sorted(rounds)]
    write_whole(run / ROUNDS, "".join(f"{line}\n" for line in lines))
    return ballot, False


def last_votes(run: Path, folder: Path, num_iterations: int) -> Ballot | None:
    """Return the votes that the last of so many iterations scored by; None where none is known."""
    rounds = read_rounds(run)
    known = [number for number in rounds if number <= num_iterations]
    return _same_votes(run, folder, rounds[max(known)]) if known else None


def _same_votes(run: Path, folder: Path, earlier: Round) -> Ballot:
    """Read the votes of a round again. Raises UserError where they have changed."""
    ballot = read_votes(folder, earlier.num_lines)
    if ballot.digest != earlier.digest:
        raise UserError(
            f"{folder / VOTES}: its first {earlier.num_lines} lines are not those that iteration "
            f"{earlier.iteration} was scored by; restore it from a copy, or delete {run / ROUNDS} "
            "to go on with the votes as they are"
        )
    num_votes = len(usable_votes(folder, ballot))
    if num_votes != earlier.num_votes:
        raise UserError(
            f"{folder / PICTURES}: {num_votes} of the votes that iteration {earlier.iteration} was "
            f"scored by have their pictures, {earlier.num_votes} had; restore them from a copy, or "
            f"delete {run / ROUNDS} to go on with the votes as they are"
        )
    return ballot


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Say for the page what training does; the time is added."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / STATUS, json.dumps({**status, "time": time.time()}))
