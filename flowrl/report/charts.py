"""Charts as inline SVG: curves with bands, and reward against KL. Colours are classes of the pages'
style sheet.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from markupsafe import Markup

from flowrl.report.compare import Condition
from flowrl.report.frame import COLOURS
from flowrl.report.runs import Run
from flowrl.report.tables import frontier
from flowrl.statistics import average

Point = tuple[float, float]

# A chart in pixels, and the frame of its axes within it; y counts downwards. The pages scale it.
WIDTH = 460
HEIGHT = 260
LEFT = 58
RIGHT = 436
TOP = 10
BOTTOM = 226
MOST_POINTS = 120
"""Points of a curve that a chart of this width can show."""


@dataclass(frozen=True)
class Curve:
    """A condition's mean over runs, (x, y), and the smallest and largest run at each x, (x, low,
    high).

    `number` counts conditions from 0 and gives the colour. A single run has no band.
    """

    label: str
    number: int
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]]

    @property
    def outline(self) -> list[Point]:
        """The corners of the band: along its upper edge, and back along its lower one."""
        upper = [(x, high) for x, _, high in self.band]
        lower = [(x, low) for x, low, _ in self.band]
        return upper + lower[::-1]


@dataclass(frozen=True)
class Axis:
    """A map from values to pixels; logarithmic where all values are positive and span more than a
    factor of 100.

    `low` lies at pixel `start` and `high` at pixel `end`, which is the smaller one for the upward
    axis: SVG counts downwards.
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
        """Make an axis with round limits around `values`, which are finite."""
        low = min(values)
        high = max(values)
        if can_be_log and low > 0 and high / low > 100:
            low = 10 ** math.floor(math.log10(low))
            high = 10 ** math.ceil(math.log10(high))
            # Whole decades, which bear the labels.
            return cls(low, high, start, end, is_log=True)
        if low == high:
            # An axis needs some length: a tenth of the value to either side, or 0.1 about 0.
            margin = (abs(low) or 1) / 10
            low = low - margin
            high = high + margin
        step = _round_step((high - low) / 4)
        # A limit that is a multiple of the step but for rounding stays.
        low = math.floor(low / step + 1e-9) * step
        high = math.ceil(high / step - 1e-9) * step
        return cls(low, high, start, end, is_log=False)

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low = self.low
        high = self.high
        if self.is_log:
            low = math.log10(low)
            high = math.log10(high)
            value = math.log10(value)
        share = (value - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return decades, or multiples of a round step."""
        if self.is_log:
            first = round(math.log10(self.low))
            last = round(math.log10(self.high))
            # About four labels, however many decades there are.
            stride = max(1, (last - first) // 4)
            return [10.0**n for n in range(first, last + 1, stride)]
        step = _round_step((self.high - self.low) / 4)
        count = round((self.high - self.low) / step)
        return [self.low + i * step for i in range(count + 1)]


def _round_step(step: float) -> float:
    """Return the least round number that is not below `step`, but for rounding."""
    power = 10.0 ** math.floor(math.log10(step))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    return next(candidate for candidate in steps if candidate >= step * (1 - 1e-9))


@dataclass(frozen=True)
class Plane:
    """The two axes of a chart, and what is drawn on them."""

    x: Axis
    y: Axis

    @classmethod
    def around(cls, points: Sequence[Point], can_be_log: bool = False) -> Plane:
        """Lay axes around one point or more, that of y logarithmic where it can be."""
        xs, ys = zip(*points, strict=True)
        across = Axis.over(xs, LEFT, RIGHT)
        upward = Axis.over(ys, BOTTOM, TOP, can_be_log)
        return cls(across, upward)

    def line(self, kind: str, points: Sequence[Point]) -> str:
        """Draw a line through points."""
        return f'<polyline class="{kind}" points="{self._pixels(points)}"/>'

    def area(self, kind: str, points: Sequence[Point]) -> str:
        """Fill the area within an outline."""
        return f'<polygon class="{kind}" points="{self._pixels(points)}"/>'

    def dot(self, number: int, point: Point, radius: float, title: str) -> str:
        """Draw a dot in the colour of a condition, with a text that the pointer shows."""
        x, y = point
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}"'
        kind = f"dot {style(number)}"
        return f'<circle class="{kind}" {place}><title>{escape(title)}</title></circle>'

    def _pixels(self, points: Sequence[Point]) -> str:
        """Write points as the attribute of a line or an outline; tenths of a pixel keep pages
        small.
        """
        pairs = [f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points]
        return " ".join(pairs)

    def svg(self, x_label: str, marks: Sequence[str], data: str = "") -> Markup:
        """Return the chart: a grid with numbers, the label of x, and the marks over it; `data` goes
        to the page's script.
        """
        grid = []
        for tick in self.y.ticks():
            level = f"{self.y(tick):.1f}"
            grid.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{level}" y2="{level}"/>')
            grid.append(_text("y", f"{LEFT - 6}", level, _number(tick)))
        for tick in self.x.ticks():
            place = f"{self.x(tick):.1f}"
            grid.append(_text("x", place, f"{BOTTOM + 15}", _number(tick)))
        middle = (LEFT + RIGHT) / 2
        label = _text("x", f"{middle}", f"{HEIGHT - 3}", x_label)
        attribute = f' data-curves="{escape(data)}"' if data else ""
        frame = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"{attribute}>'
        # Every text is escaped by now, so that the page's template must not escape it again. What
        # comes later covers what comes before.
        pieces = [frame, *grid, label, *marks, "</svg>"]
        return Markup("".join(pieces))


def _text(axis: str, x: str, y: str, text: str) -> str:
    """Write a number or a label of an axis, at a pixel."""
    return f'<text class="tick {axis}" x="{x}" y="{y}">{escape(text)}</text>'


def curves(groups: Sequence[Condition], metric: str, window: int) -> list[Curve]:
    """Return mean and range over each condition's runs, where two runs in three have the metric;
    running means of `window`. A condition without the metric has no curve.
    """
    drawn = (_curve(number, group, metric, window) for number, group in enumerate(groups))
    return [curve for curve in drawn if curve.points]


def _curve(number: int, group: Condition, metric: str, window: int) -> Curve:
    """Return the curve of a condition, without points where no run has the metric."""
    smooth = [_smooth(run.curve(metric), window) for run in group.runs]
    courses = [points for points in smooth if points]
    # Where most runs have ended, the mean of the others would jump.
    fewest = len(courses) / 1.5
    values_at = {x: values for x, values in columns(courses) if len(values) > fewest}
    means = []
    band = []
    for x in _thin(list(values_at)):
        values = values_at[x]
        means.append((x, average(values)))
        band.append((x, min(values), max(values)))
    return Curve(
        label=group.label,
        number=number,
        points=means,
        band=band if len(courses) > 1 else [],
    )


def columns(courses: Iterable[Sequence[Point]]) -> list[tuple[float, list[float]]]:
    """Return the values of all courses at each x, by rising x."""
    values_at: dict[float, list[float]] = {}
    for points in courses:
        for x, y in points:
            values_at.setdefault(x, []).append(y)
    return sorted(values_at.items())


def _smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Take running means over the last `window` values; evaluations and short runs stay as they
    are.
    """
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 4 * window:
        return list(points)
    values = [y for _, y in points]
    smooth = []
    # The first means are over what there is.
    for i, (x, _) in enumerate(points):
        start = max(0, i + 1 - window)
        smooth.append((x, average(values[start : i + 1])))
    return smooth


def _thin(values: Sequence[float]) -> list[float]:
    """Leave out values at equal distances, so that `MOST_POINTS` stay at most, the last of all
    among them.
    """
    stride = math.ceil(len(values) / MOST_POINTS)
    # Counted from the end, which is then always among them.
    backwards = list(values)[::-1]
    return backwards[:: max(stride, 1)][::-1]


def curve_chart(drawn: Sequence[Curve]) -> Markup:
    """Draw curves over the iteration, with their bands behind."""
    points: list[Point] = []
    for curve in drawn:
        points += [*curve.points, *curve.outline]
    plane = Plane.around(points, can_be_log=True)
    bands = []
    lines = []
    for curve in drawn:
        if curve.band:
            bands.append(plane.area(f"band {style(curve.number)}", curve.outline))
        lines.append(plane.line(f"line {style(curve.number)}", curve.points))
        # A line through few points hides where they are.
        if len(curve.points) < 12:
            lines += [plane.dot(curve.number, point, 2.5, curve.label) for point in curve.points]
    # The page's script needs the axis of x to tell at which iteration the pointer is.
    data = {
        "x": [plane.x.low, plane.x.high, LEFT, RIGHT],
        "curves": [_readings(curve) for curve in drawn],
    }
    return plane.svg("iteration", bands + lines, json.dumps(data))


def _readings(curve: Curve) -> dict[str, Any]:
    """Return what the page's script shows of a curve where the pointer is, with four digits."""
    points = [[x, float(format(y, ".4g"))] for x, y in curve.points]
    return {
        "label": curve.label,
        "style": style(curve.number),
        "points": points,
    }


def frontier_chart(groups: Sequence[Condition], kl: str, reward: str) -> Markup | None:
    """Draw each run's way from the base model to its end, the conditions' means, and the frontier
    through them; None where no run has both metrics.
    """
    ways_of = [_ways(group, kl, reward) for group in groups]
    every_way = [way for ways in ways_of for way in ways.values()]
    points = list(itertools.chain(*every_way))
    if not points:
        return None
    # The base model's KL is 0, and has its place on the axis.
    _, some_reward = points[0]
    plane = Plane.around([(0.0, some_reward), *points])
    ends = [_mean_end(ways) for ways in ways_of]
    marks = [plane.line("frontier", [ends[i] for i in frontier(ends)])]
    for number, group in enumerate(groups):
        marks += _way_marks(plane, number, group.label, ways_of[number])
    # The means come last, over the ways.
    for number, end in enumerate(ends):
        if ways_of[number]:
            title = f"{groups[number].label}, mean of its runs"
            marks.append(plane.dot(number, end, 6, title))
    return plane.svg(kl, marks)


def _way_marks(
    plane: Plane,
    number: int,
    label: str,
    ways: Mapping[str, list[Point]],
) -> list[str]:
    """Draw the ways of a condition's runs, each with a dot at its end."""
    marks = []
    for run_label, way in ways.items():
        title = f"{run_label}: {label}"
        marks.append(plane.line(f"way {style(number)}", way))
        marks.append(plane.dot(number, way[-1], 2.5, title))
    return marks


def _ways(group: Condition, kl: str, reward: str) -> dict[str, list[Point]]:
    """Return (KL, reward) of the evaluations of each run that has any, by the run's label."""
    ways = {run.label: path(run, kl, reward) for run in group.runs}
    return {label: way for label, way in ways.items() if way}


def path(run: Run, kl: str, reward: str) -> list[Point]:
    """Return (KL, reward) of a run's evaluations, from the base model on; one that lacks either is
    left out.
    """
    rewards = dict(run.curve(reward))
    points = []
    for iteration, distance in run.curve(kl):
        if iteration in rewards:
            points.append((distance, rewards[iteration]))
    return points


def _mean_end(ways: Mapping[str, Sequence[Point]]) -> Point:
    """Return the mean of the points where some ways end; NaN without one."""
    if not ways:
        return math.nan, math.nan
    ends = [way[-1] for way in ways.values()]
    xs, ys = zip(*ends, strict=True)
    return average(xs), average(ys)


def style(number: int) -> str:
    """Return the classes of a condition: a colour, and a dash where the colours begin anew."""
    return f"c{number % COLOURS} d{number // COLOURS} s{number}"


def _number(value: float) -> str:
    """Write a tick's value, 1e5 for 1e+05; what is left of a 0 after rounding is 0."""
    is_zero = abs(value) < 1e-15
    text = format(0.0 if is_zero else value, ".4g")
    return text.replace("e-0", "e-").replace("e+0", "e")
