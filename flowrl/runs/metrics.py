"""The reading of metrics.csv: every row that can be trusted, and what is wrong with the others."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ITERATION = "iteration"
"""The column that numbers the rows; every metrics.csv has it."""

_SEPARATORS = re.compile(r"[;\t]")
_NUMBER = re.compile(r"[-+]?((\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|nan|inf)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Figures:
    """The rows of a metrics.csv as texts by column, in order of iteration, and the first problem;
    empty without one.

    Lines that cannot be trusted are not among the rows. A last line that a kill cut short is left
    out too, but is no problem; nor is a line that stands there twice.
    """

    rows: Sequence[Mapping[str, str]]
    problem: str


def read_figures(path: Path) -> Figures:
    """Read the figures of a run; without the file there are none."""
    if not path.is_file():
        return Figures([], "")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Figures([], f"not UTF-8 at byte {error.start}")
    # Line ends are kept, by which a whole line is known.
    head, *lines = io.StringIO(text, newline="").readlines() or [""]
    columns = _cells(head)
    problem = _head_fault(head, columns)
    if problem:
        return Figures([], problem)
    rows: dict[int, dict[str, str]] = {}
    # Numbered as an editor does, whose first line is the head.
    for number, line in enumerate(filter(_is_whole, lines), 2):
        cells = _cells(line)
        reason = _fault(cells, columns)
        if not reason:
            row = dict(zip(columns, cells, strict=True))
            # Of two rows of one iteration the first stays.
            first = rows.setdefault(int(row[ITERATION]), row)
            reason = _conflict(row, first)
        if reason and not problem:
            problem = f"line {number}: {reason}"
    in_order = [rows[iteration] for iteration in sorted(rows)]
    return Figures(in_order, problem)


def _conflict(row: Mapping[str, str], first: Mapping[str, str]) -> str:
    """Say how a row differs from the first one of its iteration; empty where it does not."""
    if row == first:
        return ""
    iteration = int(row[ITERATION])
    return f"iteration {iteration} again, with other numbers"


def _is_whole(line: str) -> bool:
    """Tell whether a line has its end; the last one of a file may have been cut short by a kill."""
    return line.endswith(("\r", "\n"))


def _head_fault(head: str, columns: Sequence[str]) -> str:
    """Say what is wrong with the first line; empty where it names the columns."""
    if not _is_whole(head):
        return "no whole line in it"
    if ITERATION in columns and len(set(columns)) == len(columns):
        return ""
    written = ""
    if mark := _SEPARATORS.search(head):
        written = f"; {mark[0]!r} separates its columns, as spreadsheets write it"
    return f"its first line does not name the columns, {ITERATION!r} among them{written}"


def _cells(line: str) -> list[str]:
    """Return the cells of a line; none where it cannot be read as CSV."""
    # One line at a time, so that a quote that is never closed spoils that line alone.
    try:
        return next(csv.reader(io.StringIO(line, newline="")), [])
    except csv.Error:
        return []


def _fault(cells: Sequence[str], columns: Sequence[str]) -> str:
    """Say what is wrong with a line; empty where each of its cells is a number or empty."""
    if len(cells) != len(columns):
        return f"{len(cells)} cells, not {len(columns)}"
    for name, text in zip(columns, cells, strict=True):
        # `isdigit` alone takes digits of other scripts, which `int` might not.
        if name == ITERATION and not (text.isascii() and text.isdigit()):
            return f"{name} is {text[:40]!r}"
        if text and not _NUMBER.fullmatch(text):
            return f"{name} is {text[:40]!r}, no number"
    return ""
