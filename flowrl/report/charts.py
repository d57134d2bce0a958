"""Charts as inline SVG: curves with bands, and reward against KL. Colours are classes of the page's
style sheet.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flowrl.report.compare import Condition
from flowrl.report.frame import COLOURS
from flowrl.report.runs import Run
from flowrl.report.tables import frontier

Point = tuple[float, float]

WIDTH = 460
HEIGHT = 260
LEFT = 58
RIGHT = 436
TOP = 10
BOTTOM = 226
MOST_POINTS = 120


@dataclass(frozen=True)
class Curve:
    """A condition's mean over runs, (x, y), and the smallest and largest run at each x, (x, low,
    high).
    """

    label: str
    number: int
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class Axis:
    """From values to pixels; logarithmic where all values are positive and span more than a factor
    of 100.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    @classmethod
    def over(
        cls, values: Sequence[float], start: float, end: float, can_be_log: bool = False
    ) -> Axis:
        """Round limits around the finite ones among `values`."""
        low = min(values)
        high = max(values)
        if can_be_log and low > 0 and high / low > 100:
            return cls(
                10 ** math.floor(math.log10(low)),
                10 ** math.ceil(math.log10(high)),
                start,
                end,
                True,
            )
        if low == high:
            low = low - (abs(low) or 1) / 10
            high = high + (abs(high) or 1) / 10
        step = _round_step((high - low) / 4)
        return cls(
            math.floor(low / step + 1e-9) * step,
            math.ceil(high / step - 1e-9) * step,
            start,
            end,
            False,
        )

    def __call__(self, value: float) -> float:
        low, high = (
            (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        )
        value = math.log10(value) if self.is_log else value
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Decades, or multiples of a round step."""
        if self.is_log:
            first = round(math.log10(self.low))
            last = round(math.log10(self.high))
            return [10.0**n for n in range(first, last + 1, max(1, (last - first) // 4))]
        step = _round_step((self.high - self.low) / 4)
        count = round((self.high - self.low) / step)
        return [self.low + i * step for i in range(count + 1)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9)
    )


def curves(groups: Sequence[Condition], metric: str, window: int) -> list[Curve]:
    """Mean and range over each condition's runs, where two runs in three have the metric; running
    means of `window`.
    """
    found = []
    for number, group in enumerate(groups):
        columns: dict[float, list[float]] = {}
        runs = [points for run in group.runs if (points := _smooth(run.curve(metric), window))]
        for points in runs:
            for x, y in points:
                columns.setdefault(x, []).append(y)
        full = {x: own for x, own in sorted(columns.items()) if len(own) > len(runs) / 1.5}
        kept = _thin(list(full))
        if kept:
            mean = [(x, sum(full[x]) / len(full[x])) for x in kept]
            band = [(x, min(full[x]), max(full[x])) for x in kept] if len(runs) > 1 else []
            found.append(Curve(group.label, number, mean, band))
    return found


def _smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Running means over the last `window` values; evaluations and short runs stay as they are."""
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 4 * window:
        return list(points)
    values = [y for _, y in points]
    starts = [max(0, i + 1 - window) for i in range(len(values))]
    return [
        (x, sum(values[a : i + 1]) / (i + 1 - a))
        for i, ((x, _), a) in enumerate(zip(points, starts, strict=True))
    ]


def _thin(values: Sequence[float]) -> list[float]:
    stride = -(-len(values) // MOST_POINTS)
    return [value for i, value in enumerate(values) if (len(values) - 1 - i) % stride == 0]


def curve_chart(drawn: Sequence[Curve]) -> str:
    """Curves over the iteration, with their bands behind."""
    values = [y for curve in drawn for _, y in curve.points] + [
        y for c in drawn for _, *ys in c.band for y in ys
    ]
    x = Axis.over([x for curve in drawn for x, _ in curve.points], LEFT, RIGHT)
    y = Axis.over(values, BOTTOM, TOP, can_be_log=True)
    parts = []
    for curve in drawn:
        outline = [(a, high) for a, _, high in curve.band] + [
            (a, low) for a, low, _ in reversed(curve.band)
        ]
        if outline:
            parts.append(
                f'<polygon class="band {style(curve.number)}" points="{_pixels(outline, x, y)}"/>'
            )
    for curve in drawn:
        parts.append(
            f'<polyline class="line {style(curve.number)}" points="{_pixels(curve.points, x, y)}"/>'
        )
        if len(curve.points) < 12:
            parts += [_dot(curve.number, point, x, y, 2.5, curve.label) for point in curve.points]
    data = [
        {
            "label": curve.label,
            "style": style(curve.number),
            "points": [[a, _rounded(b)] for a, b in curve.points],
        }
        for curve in drawn
    ]
    extent = json.dumps({"x": [x.low, x.high, LEFT, RIGHT], "curves": data})
    return _svg(x, y, "iteration", "".join(parts), f' data-curves="{escape(extent)}"')


def frontier_chart(groups: Sequence[Condition], kl: str, reward: str) -> str:
    """Each run's way from the base model to its end, the conditions' means, and the frontier
    through them.
    """
    ways = [
        (n, run, way)
        for n, group in enumerate(groups)
        for run in group.runs
        if (way := path(run, kl, reward))
    ]
    if not ways:
        return ""
    x = Axis.over([0.0, *(a for *_, way in ways for a, _ in way)], LEFT, RIGHT)
    y = Axis.over([b for *_, way in ways for _, b in way], BOTTOM, TOP)
    parts = []
    for number, run, way in ways:
        parts.append(f'<polyline class="way {style(number)}" points="{_pixels(way, x, y)}"/>')
        parts.append(_dot(number, way[-1], x, y, 2.5, f"{run.label}: {groups[number].label}"))
    ends = [
        _centre([way[-1] for other, _, way in ways if other == number])
        for number in range(len(groups))
    ]
    best = [ends[i] for i in frontier(ends)]
    parts.insert(0, f'<polyline class="frontier" points="{_pixels(best, x, y)}"/>')
    for number, end in enumerate(ends):
        if not math.isnan(end[0]):
            parts.append(_dot(number, end, x, y, 6, f"{groups[number].label}, mean of its runs"))
    return _svg(x, y, kl, "".join(parts), "")


def path(run: Run, kl: str, reward: str) -> list[Point]:
    """(KL, reward) of a run's evaluations, from the base model on."""
    rewards = dict(run.curve(reward))
    return [
        (value, rewards[iteration]) for iteration, value in run.curve(kl) if iteration in rewards
    ]


def _centre(points: Sequence[Point]) -> Point:
    if not points:
        return math.nan, math.nan
    return sum(a for a, _ in points) / len(points), sum(b for _, b in points) / len(points)


def style(number: int) -> str:
    """The classes of a condition: a colour, and a dash where the colours begin anew."""
    return f"c{number % COLOURS} d{number // COLOURS} s{number}"


def _dot(number: int, point: Point, x: Axis, y: Axis, radius: float, title: str) -> str:
    place = f'cx="{x(point[0]):.1f}" cy="{y(point[1]):.1f}" r="{radius}"'
    return f'<circle class="dot {style(number)}" {place}><title>{escape(title)}</title></circle>'


def _pixels(points: Sequence[Point], x: Axis, y: Axis) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)


def _svg(x: Axis, y: Axis, x_label: str, content: str, data: str) -> str:
    grid = []
    for tick in y.ticks():
        level = f"{y(tick):.1f}"
        grid.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{level}" y2="{level}"/>')
        grid.append(f'<text class="tick y" x="{LEFT - 6}" y="{level}">{_number(tick)}</text>')
    for tick in x.ticks():
        grid.append(
            f'<text class="tick x" x="{x(tick):.1f}" y="{BOTTOM + 15}">{_number(tick)}</text>'
        )
    label = (
        f'<text class="tick x" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 3}">{escape(x_label)}</text>'
    )
    frame = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"{data}>'
    return f"{frame}{''.join(grid)}{label}{content}</svg>"


def _number(value: float) -> str:
    return (
        format(0.0 if abs(value) < 1e-15 else value, ".4g").replace("e-0", "e-").replace("e+0", "e")
    )


def _rounded(value: float) -> float:
    return float(format(value, ".4g"))
