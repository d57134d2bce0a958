"""Reading metrics.csv: every row that can be trusted, and what is wrong with the others."""

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
    """The figures of a run; without the file there are none."""
    if not path.is_file():
        return Figures([], "")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Figures([], f"not UTF-8 at byte {error.start}")
    head, *lines = io.StringIO(text, newline="").readlines() or [""]
    if not head.endswith(("\r", "\n")):
        return Figures([], "no whole line in it")
    columns = _cells(head)
    if ITERATION not in columns or len(set(columns)) < len(columns):
        mark = _SEPARATORS.search(head)
        written = f"; {mark[0]!r} separates its columns, as spreadsheets write it" if mark else ""
        return Figures(
            [], f"its first line does not name the columns, {ITERATION!r} among them{written}"
        )
    if lines and not lines[-1].endswith(("\r", "\n")):
        lines.pop()
    rows: dict[int, dict[str, str]] = {}
    problem = ""
    for number, line in enumerate(lines, 2):
        row = dict(zip(columns, _cells(line), strict=False))
        reason = _fault(_cells(line), columns)
        iteration = -1 if reason else int(row[ITERATION])
        if not reason and rows.get(iteration, row) != row:
            reason = f"iteration {iteration} again, with other numbers"
        if reason:
            problem = problem or f"line {number}: {reason}"
        else:
            rows[iteration] = row
    return Figures([rows[iteration] for iteration in sorted(rows)], problem)


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(line, newline="")), [])
    except csv.Error:
        return []


def _fault(cells: Sequence[str], columns: Sequence[str]) -> str:
    """What is wrong with a line; empty where each of its cells is a number or empty."""
    if len(cells) != len(columns):
        return f"{len(cells)} cells, not {len(columns)}"
    for name, text in zip(columns, cells, strict=True):
        if name == ITERATION and not (text.isascii() and text.isdigit()):
            return f"{name} is {text[:40]!r}"
        if text and not _NUMBER.fullmatch(text):
            return f"{name} is {text[:40]!r}, no number"
    return ""
