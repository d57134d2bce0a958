"""The page of several evaluated policies side by side: numbers, task families, the hacking panel
and images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from flowrl.images.image_statistics import MEANINGS
from flowrl.images.pictures import read_rgb
from flowrl.report.frame import COLOURS, document, embedded, paragraph, section, table

Numbers = Mapping[str, Any]
Found = Numbers | None
LONGEST = 192
"""Pixels of an image's longer side on the page; smaller images are shown enlarged, larger ones are
reduced.
"""
REWARDS = (
    "Means over prompts with 95 % bootstrap intervals, prompts resampled. Green is more and red is "
    "less than the "
    "first column beyond chance: the difference, prompt by prompt with the same noise, has an "
    "interval without 0."
)
LOOKS = (
    "What the images look like, whatever a reward says: a policy that cheats its reward moves here "
    "first."
)


def render(
    title: str,
    subtitle: str,
    sets: Mapping[str, Mapping[str, Numbers]],
    galleries: Mapping[str, Sequence[Any]],
) -> str:
    """The page as text.

    `sets` maps a prompt set to the numbers of each policy by its label (see
    `flowrl.evaluation.summary.numbers`), the base model's first; `galleries` maps a set to its rows
    (see `gallery` there).
    """
    body = []
    for name, found in sets.items():
        parts = [_rewards(found), _families(found), _looks(found), _distances(found)]
        if galleries.get(name):
            parts.append(section("Images", "", _gallery(galleries[name]), level=3))
        prompts = next(iter(found.values()))["prompts"]
        body.append(section(name, f"{prompts[0].upper()}{prompts[1:]}.", "".join(parts)))
    return document(title, paragraph(subtitle), "".join(body))


def _rewards(policies: Mapping[str, Numbers]) -> str:
    names = dict.fromkeys(
        key for each in policies.values() for key in each["metrics"] if not key.startswith("panel/")
    )
    rows = [_compared(escape(key), policies, partial(_metric, key=key)) for key in names]
    rows += [
        _row(
            "diversity <small>rms distance within a prompt</small>",
            policies,
            lambda each: _value(each["diversity"]),
        ),
        _row("KL to the reference <small>per step and dimension</small>", policies, _drift),
        _row(
            "missing",
            policies,
            lambda each: f"{each['missing']:.1%} <small>of {each['num_images']}</small>",
        ),
    ]
    return section("Rewards", REWARDS, _table(policies, rows), level=3)


def _families(policies: Mapping[str, Numbers]) -> str:
    base = next(iter(policies.values()))
    rows = []
    for family, found in base["families"].items():
        count = f" <small>{found['num_prompts']} prompts</small>" if found else ""
        rows.append(
            _compared(
                escape(family.replace("_", " ")) + count, policies, partial(_family, family=family)
            )
        )
    note = f"The mean of {base['headline']} by the prompts' task family."
    return section("Task families", note, _table(policies, rows), level=3) if rows else ""


def _looks(policies: Mapping[str, Numbers]) -> str:
    rows = [
        _compared(
            f"{escape(key.replace('_', ' '))} <small>{escape(meaning)}</small>",
            policies,
            partial(_metric, key=f"panel/{key}"),
            is_relative=True,
        )
        for key, meaning in MEANINGS.items()
    ]
    return section("Hacking panel", LOOKS, _table(policies, rows), level=3)


def _distances(policies: Mapping[str, Numbers]) -> str:
    known = next((each["distances"] for each in policies.values() if "distances" in each), None)
    if known is None:
        return ""
    note = f"Features: {known['features']}, against {known['against']}."
    if not known["is_published"]:
        note += (
            " These are the FID and KID formulas on another network: comparable on this page only."
        )
    rows = [
        _row(label, policies, partial(_distance, key=key))
        for key, label in (("frechet", "Fréchet distance"), ("kernel", "kernel distance"))
    ]
    return section("Distances", note, _table(policies, rows), level=3)


def _table(policies: Mapping[str, Numbers], rows: Sequence[str]) -> str:
    keys = (
        f"<i class='key c{i % COLOURS}'></i>{escape(label)}" for i, label in enumerate(policies)
    )
    return table(["", *keys, ""], rows)


def _row(
    label: str, policies: Mapping[str, Numbers], cell: Callable[[Numbers], str], plot: str = ""
) -> str:
    cells = "".join(f"<td class=number>{cell(each)}</td>" for each in policies.values())
    return f"<th>{label}</th>{cells}<td>{plot}</td>"


def _compared(
    label: str,
    policies: Mapping[str, Numbers],
    find: Callable[[Numbers], tuple[Found, Found]],
    is_relative: bool = False,
) -> str:
    """A row of values with their changes from the base model, and their intervals on one axis."""
    plot = _plot([find(each)[0] for each in policies.values()])
    return _row(label, policies, lambda each: _cell(*find(each), is_relative), plot)


def _metric(each: Numbers, key: str) -> tuple[Found, Found]:
    return each["metrics"].get(key), each["changes"].get(key)


def _family(each: Numbers, family: str) -> tuple[Found, Found]:
    return each["families"].get(family), each["family_changes"].get(family)


def _value(found: Found) -> str:
    if found is None:
        return "-"
    interval = (
        "" if found["low"] is None else f" <small>{found['low']:.4g} to {found['high']:.4g}</small>"
    )
    return f"{found['mean']:.4g}{interval}"


def _cell(found: Found, change: Found, is_relative: bool) -> str:
    """The value, and its change from the base model, coloured where that is beyond chance."""
    if found is None or change is None:
        return _value(found)
    direction = ""
    if change["low"] is not None:
        direction = "up" if change["low"] > 0 else "down" if change["high"] < 0 else ""
    if is_relative and direction:  # neither way is the good one
        direction = "moved"
    start = found["mean"] - change["mean"]
    shown = (
        f"{change['mean'] / abs(start):+.0%}" if is_relative and start else f"{change['mean']:+.3g}"
    )
    return f"{_value(found)} <span class='{direction}'>{shown}</span>"


def _distance(each: Numbers, key: str) -> str:
    return f"{each['distances'][key]:.4g}" if "distances" in each else "-"


def _drift(each: Numbers) -> str:
    return "-" if each["kl_ref"] is None else f"{each['kl_ref']:.3g}"


def _plot(found: Sequence[Found]) -> str:
    """Intervals of all policies on one axis, in their colours; nothing for fewer than two."""
    known = [(i, each) for i, each in enumerate(found) if each and each["low"] is not None]
    if len(known) < 2:
        return ""
    low = min(each["low"] for _, each in known)
    high = max(each["high"] for _, each in known)
    width = 160
    step = 12
    scale = (width - 12) / (high - low or 1.0)
    marks = []
    for i, each in known:
        a, m, b = (6 + (each[name] - low) * scale for name in ("low", "mean", "high"))
        line = f"<path d='M{a:.1f} {step * (i + 0.5)}H{b:.1f}'/>"
        marks.append(
            f"<g class='c{i % COLOURS}'>{line}<circle cx='{m:.1f}' cy='{step * (i + 0.5)}' "
            "r='3.5'/></g>"
        )
    size = f"viewBox='0 0 {width} {step * len(found)}'"
    return f"<svg class=intervals {size} role=img aria-label='intervals'>{''.join(marks)}</svg>"


def _gallery(rows: Sequence[Any]) -> str:
    cells = []
    for prompt, family, images in rows:
        pictures = []
        for label, path, score in images:
            caption = "no score" if score is None else f"{score:.3f}"
            pictures.append(
                f"<figure>{_picture(path)}<figcaption>{escape(label)} "
                f"{caption}</figcaption></figure>"
            )
        head = (
            f"<div class=prompt>{escape(prompt)} "
            f"<small>{escape(family.replace('_', ' '))}</small></div>"
        )
        cells.append(f"<div>{head}<div class=side>{''.join(pictures)}</div></div>")
    return f"<div class=gallery style='--wide: {130 * len(rows[0][2])}px'>{''.join(cells)}</div>"


def _picture(path: Path) -> str:
    picture = read_rgb(path)
    kind = "tiny" if max(picture.size) < LONGEST else ""
    picture.thumbnail((LONGEST, LONGEST))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"<img class='{kind}' alt='' src='{embedded(file.getvalue())}'>"
