"""One HTML page for several evaluated policies side by side: numbers, the hacking panel and images; no other files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from flowrl.panel import MEANINGS

Numbers = Mapping[str, Any]
THUMB = 192
"""Pixels of an image's longer side on the page; smaller images are shown enlarged, larger ones are reduced."""

STYLE = """
:root { --ink: #1d2733; --soft: #667788; --line: #dde3ea; --up: #17784a; --down: #b3392f; --bar: #3f6fb5 }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #f4f6f9; margin: 0 }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 80px }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; margin: 20px 0 }
h1 { font-size: 26px; margin: 0 0 4px }
h2 { font-size: 18px; margin: 0 0 10px }
h3 { font-size: 15px; margin: 22px 0 8px }
p.note { color: var(--soft); margin: 4px 0 14px; max-width: 88ch }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600 }
td, th { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap }
thead th, small { color: var(--soft); font-size: 13px; font-weight: 400 }
.up { color: var(--up); font-weight: 600 }
.down { color: var(--down); font-weight: 600 }
.moved { color: #9a6200; font-weight: 600 }
tbody th { white-space: normal; max-width: 270px }
svg { display: block }
.gallery { display: grid; gap: 14px 20px; grid-template-columns: repeat(auto-fill, minmax(var(--wide), 1fr)) }
.trio { display: flex; gap: 8px; align-items: flex-start }
.trio figure { margin: 0; flex: 1 1 0; min-width: 0; max-width: 192px }
.prompt { line-height: 1.3; margin-bottom: 4px }
figcaption { font-size: 13px; color: var(--soft); font-variant-numeric: tabular-nums }
figure img { width: 100%; border: 1px solid var(--line); border-radius: 6px; display: block }
.tiny { image-rendering: pixelated }
"""


def page(
    title: str, subtitle: str, sets: Mapping[str, Mapping[str, Numbers]], galleries: Mapping[str, Sequence[Any]]
) -> str:
    """The page as text.

    `sets` maps a prompt set to the summary of each policy by its label (see `Assessment.summary`), the base model's
    first; `galleries` maps a set to rows of (prompt, family, [(label, image path, score or None), ...]).
    """
    body = []
    for name, summaries in sets.items():
        tables = _rewards(summaries) + _looks(summaries) + _distances(summaries)
        body.append(f"<section><h2>{_text(name)}</h2>{tables}</section>")
        if galleries.get(name):
            body.append(f"<section><h2>{_text(name)}: images</h2>{_gallery(galleries[name])}</section>")
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_text(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style></head><body><main><h1>{_text(title)}</h1><p class='note'>{_text(subtitle)}</p>"
        f"{''.join(body)}</main></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _rewards(summaries: Mapping[str, Numbers]) -> str:
    names = dict.fromkeys(key for each in summaries.values() for key in each["metrics"] if not key.startswith("panel/"))
    note = (
        "Means over prompts with 95 % bootstrap intervals, prompts resampled. Coloured: the difference from the first "
        "column, prompt by prompt with the same noise, has an interval without 0."
    )
    rows = [_row(_text(key), summaries, partial(_cell, key=key), _plot(summaries, key)) for key in names]
    rows += [
        _row("diversity <small>rms distance within a prompt</small>", summaries, _diversity, ""),
        _row("KL to the reference <small>per step and dimension</small>", summaries, _drift, ""),
        _row("missing", summaries, _missing, ""),
    ]
    return f"<h3>Rewards</h3><p class='note'>{note}</p>{_table(summaries, rows)}"


def _looks(summaries: Mapping[str, Numbers]) -> str:
    note = "What the images look like, whatever a reward says: a policy that cheats its reward moves here first."
    rows = [
        _row(
            f"{_text(key.replace('_', ' '))}<br><small>{_text(meaning)}</small>",
            summaries,
            partial(_cell, key=f"panel/{key}", is_relative=True),
            _plot(summaries, f"panel/{key}"),
        )
        for key, meaning in MEANINGS.items()
    ]
    return f"<h3>Hacking panel</h3><p class='note'>{note}</p>{_table(summaries, rows)}"


def _distances(summaries: Mapping[str, Numbers]) -> str:
    known = next((each["distances"] for each in summaries.values() if each.get("distances")), None)
    if known is None:
        return ""
    note = f"Features: {known['features']}, against {known['against']}."
    if not known["is_published"]:
        note += " These are the FID and KID formulas on another network: comparable on this page only."
    rows = [
        _row(label, summaries, partial(_distance, key=key), "")
        for key, label in (("frechet", "Fréchet distance"), ("kernel", "kernel distance"))
    ]
    return f"<h3>Distances</h3><p class='note'>{_text(note)}</p>{_table(summaries, rows)}"


def _table(summaries: Mapping[str, Numbers], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{_text(label)}</th>" for label in summaries)
    head = f"<thead><tr><th></th>{head}<th></th></tr></thead>"
    return f"<div class='scroll'><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _row(label: str, summaries: Mapping[str, Numbers], cell: Callable[[Numbers], str], plot: str) -> str:
    cells = "".join(f"<td>{cell(each)}</td>" for each in summaries.values())
    return f"<tr><th>{label}</th>{cells}<td>{plot}</td></tr>"


def _value(found: Numbers | None) -> str:
    if found is None:
        return "-"
    return f"{found['mean']:.4g} <small>{found['low']:.4g} to {found['high']:.4g}</small>"


def _diversity(each: Numbers) -> str:
    return _value(each["diversity"])


def _missing(each: Numbers) -> str:
    return f"{each['missing']:.1%} <small>of {each['num_images']}</small>"


def _distance(each: Numbers, key: str) -> str:
    return f"{each['distances'][key]:.4g}" if each.get("distances") else "-"


def _drift(each: Numbers) -> str:
    return "-" if each["kl_ref"] is None else f"{each['kl_ref']:.3g}"


def _cell(each: Numbers, key: str, is_relative: bool = False) -> str:
    """The value, and its change from the base model, coloured where that is beyond chance."""
    found, change = each["metrics"].get(key), each["changes"].get(key)
    if found is None or change is None:
        return _value(found)
    direction = "up" if change["low"] > 0 else "down" if change["high"] < 0 else ""
    if is_relative and direction:  # neither way is the good one
        direction = "moved"
    start = found["mean"] - change["mean"]
    shown = f"{change['mean'] / abs(start):+.0%}" if is_relative and start else f"{change['mean']:+.3g}"
    return f"{_value(found)} <span class='{direction}'>{shown}</span>"


def _plot(summaries: Mapping[str, Numbers], key: str) -> str:
    """Intervals of all policies on one axis."""
    found = [each["metrics"].get(key) for each in summaries.values()]
    known = [each for each in found if each]
    if len(known) < 2:
        return ""
    low, high = min(each["low"] for each in known), max(each["high"] for each in known)
    width, step = 160, 12
    scale = (width - 12) / (high - low or 1.0)
    marks = []
    for i, each in enumerate(found):
        if each:
            a, m, b = (6 + (each[name] - low) * scale for name in ("low", "mean", "high"))
            y = step * (i + 0.5)
            marks.append(f"<path d='M{a:.1f} {y}H{b:.1f}' stroke='var(--bar)' stroke-width='2'/>")
            marks.append(f"<circle cx='{m:.1f}' cy='{y}' r='3.5' fill='var(--bar)'/>")
    size = f"width='{width}' height='{step * len(found)}'"
    return f"<svg {size} role='img' aria-label='intervals'>{''.join(marks)}</svg>"


def _gallery(rows: Sequence[Any]) -> str:
    cells = []
    for prompt, family, images in rows:
        pictures = []
        for label, path, score in images:
            caption = "no score" if score is None else f"{score:.3f}"
            pictures.append(f"<figure>{_embedded(path)}<figcaption>{_text(label)} {caption}</figcaption></figure>")
        head = f"<div class='prompt'>{_text(prompt)} <small>{_text(family)}</small></div>"
        cells.append(f"<div>{head}<div class='trio'>{''.join(pictures)}</div></div>")
    wide = 130 * len(rows[0][2])
    return f"<div class='gallery' style='--wide: {wide}px'>{''.join(cells)}</div>"


def _embedded(path: Path) -> str:
    """The picture itself, inside the page."""
    picture = Image.open(path).convert("RGB")
    kind = "tiny" if max(picture.size) < THUMB else ""
    picture.thumbnail((THUMB, THUMB))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"<img class='{kind}' alt='' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"
