"""The page of several evaluated policies side by side: numbers, task families, the hacking panel
and images.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.images.clips import evenly, save_moving
from flowrl.images.contact_sheet import MOVING
from flowrl.images.motion import ALL_MEANINGS, MOTION_MEANINGS
from flowrl.images.pictures import read_frames, read_upright
from flowrl.report.frame import COLOURS, embedded, fill
from flowrl.statistics import ROUNDING, interval_kinds

Numbers = Mapping[str, Any]
TEMPLATE = Path(__file__).parent / "templates" / "evaluation.html"
LONGEST = 192
"""Pixels of an image's longer side on the page; smaller images are shown enlarged, larger ones are
reduced.
"""
QUALITY = 85
"""Of the page's moving pictures, of 100."""
PLOT_WIDTH = 160
PLOT_MARGIN = 6
PLOT_STEP = 12
"""Pixels of a plot of intervals: its width, what stays free at either end, a line's height."""
REWARDS = (
    "Means over prompts with {intervals}; images of one prompt count as one. Green is more and red "
    "is less than the first column beyond chance: the difference, prompt by prompt with the same "
    "noise, has an interval without 0."
)
SOURCE = "the picture that is edited"
"""The label of a prompt's own picture in a gallery, which has no score."""
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
    """The interval of the policy of this number, in pixels of the plot's axis.

    Numbers count the policies from 0; each has its colour in the style sheet.
    """

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
    """Return the table of the reward and its parts, with what else is measured of every sample."""
    # Policies may have been evaluated with different parts: a row for each that any of them has.
    names = dict.fromkeys(key for numbers in policies.values() for key in numbers["metrics"])
    rows = []
    for name in names:
        if not name.startswith("panel/"):
            rows.append(_compared(Cell(name), policies, "metrics", "changes", name))
    diversity = []
    drift = []
    missing = []
    for numbers in policies.values():
        diversity.append(_value(numbers["diversity"]))
        drift.append(_drift(numbers["kl_ref"]))
        missing.append(Cell(f"{numbers['missing']:.1%}", f"of {numbers['num_images']}"))
    rows.append(Row(Cell("diversity", "rms distance within a prompt"), diversity))
    rows.append(Row(Cell("KL to the reference", "per step and dimension"), drift))
    rows.append(Row(Cell("missing"), missing))
    note = REWARDS.format(intervals=_kinds(policies))
    return Table("Rewards", note, rows)


def _kinds(policies: Mapping[str, Numbers]) -> str:
    """Say which intervals the means of all metrics have."""
    counts: list[int] = []
    for numbers in policies.values():
        estimates = filter(None, numbers["metrics"].values())
        counts += [estimate["num_prompts"] for estimate in estimates]
    return interval_kinds(counts, "prompts")


def _families(policies: Mapping[str, Numbers]) -> Table:
    """Return the table of the headline by task family; the families are those of the base model's
    prompts, which are everybody's.
    """
    base = next(iter(policies.values()))
    rows = []
    for family, estimate in base["families"].items():
        count = f"{estimate['num_prompts']} prompts" if estimate else ""
        head = Cell(family.replace("_", " "), count)
        rows.append(_compared(head, policies, "families", "family_changes", family))
    note = f"The mean of {base['headline']} by the prompts' task family."
    return Table("Task families", note, rows)


def _looks(policies: Mapping[str, Numbers]) -> Table:
    """Return the table of the hacking panel, its changes in percent of the base model's value."""
    rows = []
    for key, meaning in ALL_MEANINGS.items():
        if key in MOTION_MEANINGS and not _are_clips(policies):
            continue
        head = Cell(key.replace("_", " "), meaning)
        row = _compared(
            head,
            policies,
            "metrics",
            "changes",
            f"panel/{key}",
            is_relative=True,
        )
        rows.append(row)
    return Table("Hacking panel", LOOKS, rows)


def _are_clips(policies: Mapping[str, Numbers]) -> bool:
    """Tell whether motion was measured, which images do not have."""
    keys = {f"panel/{name}" for name in MOTION_MEANINGS}
    return any(not keys.isdisjoint(numbers["metrics"]) for numbers in policies.values())


def _distances(policies: Mapping[str, Numbers]) -> Table:
    """Return the distances of the images; a table without rows where none were measured."""
    # Without a folder to compare with, the first policy has none: the others' are taken from it.
    measured = [numbers.get("distances", {}) for numbers in policies.values()]
    known = next(filter(None, measured), None)
    if known is None:
        return Table("Distances", "", ())
    note = f"Features: {known['features']}, against {known['against']}."
    if not known["is_published"]:
        note += (
            " These are the FID and KID formulas on another network: comparable on this page only."
        )
    if _are_clips(policies):
        note += " Of a clip, its first frame is compared."
    rows = []
    labels = {"frechet": "Fréchet distance", "kernel": "kernel distance"}
    for key, label in labels.items():
        texts = [f"{distance[key]:.4g}" if distance else "-" for distance in measured]
        rows.append(Row(Cell(label), [Cell(text) for text in texts]))
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
    estimates = []
    cells = []
    for numbers in policies.values():
        estimate = numbers[values].get(key)
        change = numbers[changes].get(key)
        estimates.append(estimate)
        cells.append(_cell(estimate, change, is_relative))
    return Row(head, cells, _intervals(estimates))


def _value(estimate: Numbers | None) -> Cell:
    """Return an estimate with its interval, which a mean of few prompts has not."""
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
    moved = change["mean"]
    start = estimate["mean"] - moved
    # The z of the formats writes a small negative change as +0, not as -0.
    if is_relative and start:
        text = f"{moved / abs(start):+z.0%}"
    else:
        # Equal images scored in other batches differ by what float32 rounds.
        is_rounding = abs(moved) <= ROUNDING * abs(start)
        text = f"{0.0 if is_rounding else moved:+z.3g}"
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
    """Place the intervals of all policies on one axis; nothing for fewer than two.

    The axis runs from the lowest to the highest bound.
    """
    known = {i: estimate for i, estimate in enumerate(estimates) if _has_bounds(estimate)}
    if len(known) < 2:
        return []
    low = min(estimate["low"] for estimate in known.values())
    high = max(estimate["high"] for estimate in known.values())
    extent = high - low or 1.0  # all intervals may be one point
    scale = (PLOT_WIDTH - 2 * PLOT_MARGIN) / extent
    intervals = []
    for number, estimate in known.items():
        values = (estimate["low"], estimate["mean"], estimate["high"])
        pixels = [round(PLOT_MARGIN + (value - low) * scale, 1) for value in values]
        intervals.append(Interval(number, *pixels))
    return intervals


def _has_bounds(estimate: Numbers | None) -> bool:
    return estimate is not None and estimate["low"] is not None


def _gallery(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Read the pictures of a gallery's rows, (prompt, family, [(label, file, score or None)])."""
    filled_rows = []
    for prompt, family, images in rows:
        filled_rows.append(
            {
                "prompt": prompt,
                "family": family.replace("_", " "),
                "pictures": [_picture(label, path, score) for label, path, score in images],
            }
        )
    return filled_rows


def _picture(label: str, path: Path, score: float | None) -> Picture:
    """Embed an image of at most `LONGEST` pixels a side, so that a page stays small; a clip moves,
    in `MOVING` of its frames.
    """
    frames = [read_upright(path)] if label == SOURCE else read_frames(path)
    frames = [frames[number] for number in evenly(len(frames), MOVING)]
    is_tiny = max(frames[0].size) < LONGEST
    for frame in frames:
        frame.thumbnail((LONGEST, LONGEST))  # only ever reduces
    file = io.BytesIO()
    if len(frames) == 1:
        frames[0].save(file, format="PNG")
        address = embedded(file.getvalue())
    else:
        save_moving(frames, file, "WEBP", lossless=is_tiny, quality=QUALITY)
        address = embedded(file.getvalue(), "webp")
    text = "no score" if score is None else f"{score:.3f}"
    if label == SOURCE:
        text = ""
    return Picture(label, text, address, is_tiny)
