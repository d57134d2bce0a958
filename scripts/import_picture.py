"""Draw which rooms of the package import which, from the imports themselves.

    python scripts/import_picture.py        # writes docs/imports.svg

Each box is a folder below flowrl/ or stands for modules directly in it. A room stands above all
rooms that it imports, and an arrow leads from it to those of them that it does not reach by way of
another one.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flowrl"
HALL = "mathematics"
METHOD = "algorithm, rollout"
ABOVE_HALL = ("diagnostics", "algorithm", "rollout")
"""Modules of the hall that are made of samplers and losses, and so have a box of their own."""

BASE = ("errors", "types", "values")
"""Imported by nearly all, and so left out of the picture."""

WIDTH = 120
HEIGHT = 28
GAP_X = 24
GAP_Y = 44
MARGIN = 16

Rooms = dict[str, set[str]]


def room_of(name: str) -> str:
    """Name the room of a dotted module of the package: its folder, or the hall."""
    parts = name.split(".")
    if len(parts) < 2:
        return HALL
    if parts[1] in ABOVE_HALL:
        return METHOD
    if parts[1] == "__main__":
        return "cli"
    if parts[1] in BASE or (PACKAGE / parts[1]).is_dir():
        return parts[1]
    return HALL


def imported_modules(text: str) -> Iterator[str]:
    """Yield the dotted names of the package's own modules that a source imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "flowrl":
            yield from (f"flowrl.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flowrl."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("flowrl."))


def read_rooms() -> Rooms:
    """Collect, for each room, the rooms that its modules import."""
    rooms: Rooms = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = room_of(name.removesuffix(".__init__"))
        imported = {room_of(other) for other in imported_modules(path.read_text())}
        rooms.setdefault(room, set()).update(imported - {room} - set(BASE))
    return {room: others for room, others in rooms.items() if room not in BASE}


def levels_of(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """Give each room the length of the longest chain of imports below it.

    Raises ValueError for rooms that import each other.
    """
    levels = dict.fromkeys(rooms, 0)
    for _ in rooms:
        for room, others in rooms.items():
            lower = [levels[other] + 1 for other in others]
            levels[room] = max([levels[room], *lower])
    if max(levels.values()) >= len(rooms):
        raise ValueError("some rooms import each other, directly or by way of others")
    return levels


def direct(rooms: Mapping[str, set[str]]) -> Rooms:
    """Leave out the imports of a room that one of its other imports implies."""
    reached: Rooms = {room: set(others) for room, others in rooms.items()}
    for _ in rooms:
        for room, others in reached.items():
            for other in list(others):
                others |= reached[other] - {room}
    kept: Rooms = {}
    for room, others in rooms.items():
        by_way = [reached[other] for other in others]
        implied: set[str] = set().union(*by_way)
        kept[room] = others - implied
    return kept


def draw(rooms: Mapping[str, set[str]]) -> str:
    """Draw rooms as boxes in rows, importers above, with arrows to what they import."""
    levels = levels_of(rooms)
    rows: dict[int, list[str]] = {}
    for room in sorted(rooms):
        rows.setdefault(levels[room], []).append(room)
    top = max(rows)
    widest = max(len(row) for row in rows.values())
    width = 2 * MARGIN + widest * (WIDTH + GAP_X) - GAP_X
    height = 2 * MARGIN + (top + 1) * (HEIGHT + GAP_Y) - GAP_Y
    places: dict[str, tuple[float, float]] = {}
    for level, row in rows.items():
        row_width = len(row) * (WIDTH + GAP_X) - GAP_X
        left = (width - row_width) / 2
        y = MARGIN + (top - level) * (HEIGHT + GAP_Y)
        for number, room in enumerate(row):
            places[room] = (left + number * (WIDTH + GAP_X), y)
    arrows = [
        _arrow(places[room], places[other])
        for room, others in sorted(direct(rooms).items())
        for other in sorted(others)
    ]
    boxes = [_box(room, *place) for room, place in places.items()]
    return "\n".join([_head(width, height), *arrows, *boxes, "</svg>", ""])


def _head(width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        'font-family="sans-serif" font-size="12">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#888"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1 = start[0] + WIDTH / 2
    y1 = start[1] + HEIGHT
    x2 = end[0] + WIDTH / 2
    y2 = end[1]
    return (
        f'<path d="M{x1:g} {y1:g} C{x1:g} {y1 + GAP_Y / 2:g} {x2:g} {y2 - GAP_Y / 2:g} '
        f'{x2:g} {y2:g}" fill="none" stroke="#aaa" marker-end="url(#tip)"/>'
    )


def _box(room: str, x: float, y: float) -> str:
    fill = "#e8f0e8" if room == HALL else "#eef2f8"
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{fill}" '
        f'stroke="#667"/><text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 4:g}" '
        f'text-anchor="middle" fill="#223">{escape(room)}</text>'
    )


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "imports.svg")
    out: Path = parser.parse_args().out
    out.write_text(draw(read_rooms()))
    print(out)


if __name__ == "__main__":
    main()
