"""The page of several evaluated policies side by side: numbers, task families, the hacking panel
and images.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.images.image_statistics import MEANINGS
from flowrl.images.pictures import read_rgb
from flowrl.report.frame import COLOURS, embedded, fill
from flowrl.statistics import ROUNDING, interval_kinds

Numbers = Mapping[str, Any]
TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
LONGEST = 192
"""Pixels of an image's longer side on the page; smaller images are shown enlarged, larger ones are
reduced.
"""
PLOT_WIDTH = 160
PLOT_MARGIN = 6
PLOT_STEP = 12
"""Pixels of a plot of intervals: its width, what stays free at either end, a line's height."""
REWARDS = (
    "Means over prompts with {intervals}; images of one prompt count as one. Green is more and red "
    "is less than the first column beyond chance: the difference, prompt by prompt with the same "
    "noise, has an interval without 0."
)
LOOKS = (
    "What the images look like, whatever a reward says: a policy that cheats its reward moves here "
    "first."
)


@dataclass(frozen=True)
class Cell:
    """A value for reading, a remark in small print, and its change from the base model; the change
    is coloured by `direction`: up, down, moved, or nothing within chance.
    """

    text: str
    remark: str = ""
    change: str = ""
    direction: str = ""


@dataclass(frozen=True)
class Interval:
    """The interval of the policy of this number, in pixels of the plot's axis."""

    number: int
    low: float
    mean: float
    high: float


@dataclass(frozen=True)
class Row:
    """A row of a table: its head, a cell a policy, and the intervals that are plotted beside."""

    head: Cell
    cells: Sequence[Cell]
    intervals: Sequence[Interval] = ()


@dataclass(frozen=True)
class Table:
    """Rows below a title and a note."""

    title: str
    note: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Picture:
    """One policy's image of a prompt with its score in words; `address` holds the image itself."""

    label: str
    score: str
    address: str
    is_tiny: bool


def render(
    title: str,
    subtitle: str,
    sets: Mapping[str, Mapping[str, Numbers]],
    galleries: Mapping[str, Sequence[Any]],
) -> str:
    """Return the page as text.

    `sets` maps a prompt set to the numbers of each policy by its label (see
    `flowrl.evaluation.summary.numbers`), the base model's first; `galleries` maps a set to its rows
    (see `gallery` there).
    """
    filled_sets = []
    for name, policies in sets.items():
        prompts = next(iter(policies.values()))["prompts"]
        makers = (_rewards, _families, _looks, _distances)
        tables = [make(policies) for make in makers]
        filled_sets.append(
            {
                "name": name,
                "note": f"{prompts[0].upper()}{prompts[1:]}.",
                "labels": list(policies),
                "tables": [table for table in tables if table.rows],
                "gallery": _gallery(galleries.get(name, ())),
            }
        )
    return fill(
        TEMPLATE,
        title=title,
        subtitle=subtitle,
        sets=filled_sets,
        num_colours=COLOURS,
        width=PLOT_WIDTH,
        step=PLOT_STEP,
    )


def _rewards(policies: Mapping[str, Numbers]) -> Table:
    names = dict.fromkeys(key for numbers in policies.values() for key in numbers["metrics"])
    rows = [
        _compared(Cell(name), policies, "metrics", "changes", name)
        for name in names
        if not name.startswith("panel/")
    ]
    diversity = Cell("diversity", "rms distance within a prompt")
    rows.append(Row(diversity, [_value(numbers["diversity"]) for numbers in policies.values()]))
    drift = Cell("KL to the reference", "per step and dimension")
    rows.append(Row(drift, [_drift(numbers["kl_ref"]) for numbers in policies.values()]))
    missing = [
        Cell(f"{numbers['missing']:.1%}", f"of {numbers['num_images']}")
        for numbers in policies.values()
    ]
    rows.append(Row(Cell("missing"), missing))
    return Table("Rewards", REWARDS.format(intervals=_kinds(policies)), rows)


def _kinds(policies: Mapping[str, Numbers]) -> str:
    """Say which intervals the means of all metrics have."""
    counts: list[int] = []
    for numbers in policies.values():
        estimates = filter(None, numbers["metrics"].values())
        counts += [estimate["num_prompts"] for estimate in estimates]
    return interval_kinds(counts, "prompts")


def _families(policies: Mapping[str, Numbers]) -> Table:
    base = next(iter(policies.values()))
    rows = []
    for family, estimate in base["families"].items():
        count = f"{estimate['num_prompts']} prompts" if estimate else ""
        head = Cell(family.replace("_", " "), count)
        rows.append(_compared(head, policies, "families", "family_changes", family))
    note = f"The mean of {base['headline']} by the prompts' task family."
    return Table("Task families", note, rows)


def _looks(policies: Mapping[str, Numbers]) -> Table:
    rows = []
    for key, meaning in MEANINGS.items():
        head = Cell(key.replace("_", " "), meaning)
        rows.append(
            _compared(head, policies, "metrics", "changes", f"panel/{key}", is_relative=True)
        )
    return Table("Hacking panel", LOOKS, rows)


def _distances(policies: Mapping[str, Numbers]) -> Table:
    """Return the distances of the images; a table without rows where none were measured."""
    measured = [numbers.get("distances", {}) for numbers in policies.values()]
    known = next(filter(None, measured), None)
    if known is None:
        return Table("Distances", "", ())
    note = f"Features: {known['features']}, against {known['against']}."
    if not known["is_published"]:
        note += (
            " These are the FID and KID formulas on another network: comparable on this page only."
        )
    rows = []
    for key, label in (("frechet", "Fréchet distance"), ("kernel", "kernel distance")):
        cells = [Cell(f"{distance[key]:.4g}" if distance else "-") for distance in measured]
        rows.append(Row(Cell(label), cells))
    return Table("Distances", note, rows)


def _compared(
    head: Cell,
    policies: Mapping[str, Numbers],
    values: str,
    changes: str,
    key: str,
    is_relative: bool = False,
) -> Row:
    """Return a row of estimates with their changes from the base model, and their intervals.

    `values` and `changes` name where the numbers of a policy hold the two under `key`.
    """
    estimates = [numbers[values].get(key) for numbers in policies.values()]
    moves = [numbers[changes].get(key) for numbers in policies.values()]
    cells = [
        _cell(estimate, move, is_relative) for estimate, move in zip(estimates, moves, strict=True)
    ]
    return Row(head, cells, _intervals(estimates))


def _value(estimate: Numbers | None) -> Cell:
    if estimate is None:
        return Cell("-")
    text = f"{estimate['mean']:.4g}"
    if estimate["low"] is None:
        return Cell(text)
    return Cell(text, f"{estimate['low']:.4g} to {estimate['high']:.4g}")


def _cell(estimate: Numbers | None, change: Numbers | None, is_relative: bool) -> Cell:
    """Return the value, and its change from the base model, coloured where that is beyond
    chance.
    """
    value = _value(estimate)
    if estimate is None or change is None:
        return value
    direction = _direction(change)
    if is_relative and direction:  # neither way is the good one
        direction = "moved"
    start = estimate["mean"] - change["mean"]
    if is_relative and start:
        text = f"{change['mean'] / abs(start):+.0%}"
    else:
        is_rounding = abs(change["mean"]) <= ROUNDING * abs(start)
        text = f"{0.0 if is_rounding else change['mean']:+.3g}"
    return Cell(value.text, value.remark, text, direction)


def _direction(change: Numbers) -> str:
    """Tell which way a change went beyond chance; nothing where its interval holds 0."""
    if change["low"] is None:
        return ""
    if change["low"] > 0:
        return "up"
    return "down" if change["high"] < 0 else ""


def _drift(kl_ref: float | None) -> Cell:
    return Cell("-" if kl_ref is None else f"{kl_ref:.3g}")


def _intervals(estimates: Iterable[Any]) -> list[Interval]:
    """Place the intervals of all policies on one axis; nothing for fewer than two."""
    known = {i: estimate for i, estimate in enumerate(estimates) if _has_bounds(estimate)}
    if len(known) < 2:
        return []
    low = min(estimate["low"] for estimate in known.values())
    high = max(estimate["high"] for estimate in known.values())
    scale = (PLOT_WIDTH - 2 * PLOT_MARGIN) / (high - low or 1.0)
    intervals = []
    for number, estimate in known.items():
        ends = (estimate[name] for name in ("low", "mean", "high"))
        pixels = [round(PLOT_MARGIN + (value - low) * scale, 1) for value in ends]
        intervals.append(Interval(number, *pixels))
    return intervals


def _has_bounds(estimate: Numbers | None) -> bool:
    return estimate is not None and estimate["low"] is not None


def _gallery(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Read the pictures of a gallery's rows, (prompt, family, [(label, file, score or None)])."""
    filled_rows = []
    for prompt, family, images in rows:
        pictures = [_picture(label, path, score) for label, path, score in images]
        filled_rows.append(
            {"prompt": prompt, "family": family.replace("_", " "), "pictures": pictures}
        )
    return filled_rows


def _picture(label: str, path: Path, score: float | None) -> Picture:
    picture = read_rgb(path)
    is_tiny = max(picture.size) < LONGEST
    picture.thumbnail((LONGEST, LONGEST))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    text = "no score" if score is None else f"{score:.3f}"
    return Picture(label, text, embedded(file.getvalue()), is_tiny)
