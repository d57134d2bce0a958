"""A study's figures as PNG and SVG, in the colours of the report's charts. Only here is matplotlib
imported.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowrl.report.charts import Point, columns
from flowrl.statistics import average, mean
from flowrl.studies.analysis import Groups, by_seed, conditions, course
from flowrl.studies.budget import groups_at, paced, seconds_of_an_image, spent
from flowrl.studies.plan import Section, Study
from flowrl.studies.record import Metric, Metrics, Record, Results, Simulation, mean_of

COLOURS = (
    "#2f6db3",
    "#d9742b",
    "#2a9469",
    "#b8477f",
    "#7a5cc0",
    "#a08412",
    "#2a93a8",
    "#8c5a3c",
    "#4a525a",
)
DASHES = ("-", "--", ":")
MARKERS = "osD"
METHODS = (
    "flow_grpo",
    "flow_cps",
    "grpo_guard",
    "diffusion_nft",
    "flow_dppo",
    "flow_dppo_cps",
    "flow_dppo_all",
    "flow_dppo_cps_all",
    "flow_cps_ratio",
)
"""Methods with a colour of their own, the one at the same place of COLOURS. It is theirs in every
figure in which no method has more variants than there are markers.
"""
CAPTIONS = {
    "paths": (
        "Bold: means over runs at each evaluation, from the base model to the mark at the end of "
        "training; thin: the runs."
    ),
    "curves": "Means over runs; the band holds all of them. Images: drawn for training.",
    "speeds": "Means over runs; the band holds all of them. Seconds: of training alone.",
    "dots": (
        "After training: means over seeds with 95 % intervals, cut where they leave the frame; "
        "faint: the runs."
    ),
    "noise": "A step whose exact KL is the threshold.",
    "contradictions": "Each clip at its best range for that many dimensions.",
}
STYLE: Any = {
    "axes.facecolor": "#f6f7f8",
    "axes.edgecolor": "#dfe3e7",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": "#5c6670",
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dfe3e7",
    "text.color": "#1d2126",
    "xtick.color": "#5c6670",
    "ytick.color": "#5c6670",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "flowrl",  # so that the same record gives the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}
WIDTH = 6.4
HEIGHT = 4.0


def figure_names(study: Study, results: Results) -> list[str]:
    """Name the figures that a record can give: those of a simulation, and those of runs where the
    record holds some.
    """
    names = []
    for name, spec in study.report.get("figures", {}).items():
        if spec["kind"] in SIMULATED or _groups(study, spec, results):
            names.append(name)
    return names


def _groups(study: Study, spec: Section, results: Results) -> Groups:
    """Return the runs that a figure shows, by condition; those `at` a budget of the report as if
    they had ended there.
    """
    stages = spec.get("stages", study.report["stages"])
    runs = paced(results["runs"], study.report.get("pace", ()))
    groups = conditions(runs, stages)
    unit = spec.get("at")
    return groups_at(groups, unit, study.report["budgets"][unit]) if unit else groups


def fingerprint(study: Study, results: Results) -> str:
    """Return a digest of the record that a figure is drawn from, and of how; it stands in the file,
    so that a stale figure can be told.
    """
    settings = [study.report.get(key) for key in ("stages", "metrics", "figures")]
    settings += [study.report[key] for key in ("budgets", "pace") if key in study.report]
    text = json.dumps([results, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(study: Study, results: Results, folder: Path) -> list[Path]:
    """Write every figure of a study into `folder`, as PNG and as SVG; return the paths."""
    # Not at the module's head: matplotlib is slow to import, and most uses of a study draw nothing.
    import matplotlib
    from matplotlib.figure import Figure

    paths: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    description = fingerprint(study, results)
    with matplotlib.rc_context(STYLE):
        for name in figure_names(study, results):
            # Without pyplot, which would ask for a display and keep every figure alive.
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            _draw_one(figure, study, study.report["figures"][name], results)
            # Without a date and a version, so that the same record gives the same file.
            for suffix, unwanted in (("png", "Software"), ("svg", "Date")):
                path = folder / f"{name}.{suffix}"
                metadata = {"Description": description, unwanted: None}
                figure.savefig(path, dpi=150, metadata=metadata)
                paths.append(path)
    return paths


def _draw_one(figure: Any, study: Study, spec: Section, results: Results) -> None:
    """Draw what `spec` describes: of a simulation, or of the study's runs."""
    kind = spec["kind"]
    if kind in SIMULATED:
        axes = figure.subplots()
        SIMULATED[kind](axes, results["simulation"])
    else:
        groups = _groups(study, spec, results)
        KINDS[kind](figure, groups, study.report["metrics"], spec)


def looks(labels: Sequence[str]) -> list[int]:
    """Return a number for each condition, which `style` and `marker` turn into its look: modulo the
    number of colours it is that of its colour, and how often they fit into it that of its dash and
    marker.

    It is the method's own colour where that tells all conditions apart; else they have one after
    the other.
    """
    methods = [label.split(" ", 1)[0] for label in labels]
    are_known = set(methods) <= set(METHODS)
    if not are_known or max(map(methods.count, methods)) > len(MARKERS):
        return list(range(len(labels)))
    numbers = []
    for i, method in enumerate(methods):
        # Variants of one method share its colour and differ in dash and marker.
        num_earlier = methods[:i].count(method)
        numbers.append(METHODS.index(method) + len(COLOURS) * num_earlier)
    return numbers


def style(number: int) -> dict[str, Any]:
    """Return a colour, and a dash where the colours begin anew."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
    }


def marker(number: int) -> str:
    """Return a circle, and another form where the colours begin anew."""
    return MARKERS[number // len(COLOURS) % len(MARKERS)]


def paths_figure(figure: Any, groups: Groups, metrics: Metrics, spec: Section) -> None:
    """Draw each condition's way from the base model to its end: its runs thin, their mean bold.

    `spec` names the metrics of the two axes, `x` and `y`, by their keys in `metrics`.
    """
    axes = figure.subplots()
    x = metrics[spec["x"]]
    y = metrics[spec["y"]]
    numbers = looks(list(groups))
    for number, (label, runs) in zip(numbers, groups.items(), strict=True):
        look = style(number)
        ways = [course(run, x, y) for run in runs]
        for way in ways:
            axes.plot(*zip(*way, strict=True), **look, linewidth=0.6, alpha=0.25)
        # A run that failed early has a shorter way; in a mean over it as well, the last points
        # would move because it is missing there.
        longest = max(map(len, ways), default=0)
        full = [way for way in ways if way and len(way) == longest]
        if full:
            centre = [_centre(points) for points in zip(*full, strict=True)]
            axes.plot(*zip(*centre, strict=True), **look, linewidth=1.6)
            end = {"color": look["color"], "markersize": 7, "label": label}
            axes.plot(*centre[-1], marker(number), **end)
    axes.set_xlabel(spec["x"])
    axes.set_ylabel(spec["y"])
    _outside(figure)


def _centre(points: Sequence[Point]) -> Point:
    """Return the point in the middle of some, one of each run."""
    xs, ys = zip(*points, strict=True)
    return average(xs), average(ys)


def curves_figure(figure: Any, groups: Groups, metrics: Metrics, spec: Section) -> None:
    """Draw a score over the images drawn for training: the mean over runs, and the band from the
    smallest to the largest.

    `spec` names the score, `y`, by its key in `metrics`.
    """
    _draw_curves(figure, groups, metrics[spec["y"]], "images")
    figure.axes[0].set_ylabel(spec["y"])


def speeds_figure(figure: Any, groups: Groups, metrics: Metrics, spec: Section) -> None:
    """Draw a score over the seconds of training as `curves_figure` does over the images."""
    _draw_curves(figure, groups, metrics[spec["y"]], "seconds")
    figure.axes[0].set_ylabel(spec["y"])


def _draw_curves(figure: Any, groups: Groups, score: Metric, unit: str) -> None:
    axes = figure.subplots()
    numbers = looks(list(groups))
    for number, (label, runs) in zip(numbers, groups.items(), strict=True):
        look = style(number)
        image_costs = seconds_of_an_image(runs) if unit == "seconds" else 1.0
        costs: list[float] = []
        scores: list[Sequence[float]] = []
        for cost, values in columns(_scores(run, score, image_costs) for run in runs):
            # A mean over other runs than the one before it would move for that alone.
            if len(values) == len(runs) and not math.isnan(sum(values)):
                costs.append(cost)
                scores.append(values)
        lowest = [min(values) for values in scores]
        highest = [max(values) for values in scores]
        band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(costs, lowest, highest, **band)
        means = [average(values) for values in scores]
        axes.plot(costs, means, **look, label=label)
    axes.set_xlabel(unit)
    _outside(figure)


def _scores(run: Record, metric: Metric, image_costs: float) -> list[Point]:
    """Return (spent on training, score) of a run's evaluations."""
    scores = [mean_of(row, metric) for row in run["evaluations"]]
    return list(zip(spent(run, image_costs), scores, strict=True))


def dots_figure(figure: Any, groups: Groups, metrics: Metrics, spec: Section) -> None:
    """Draw one panel a metric: each condition's mean over seeds with its 95 % interval, and its
    runs as faint dots.

    `spec` names the metrics by their keys in `metrics`.
    """
    names: Sequence[str] = spec["metrics"]
    width = WIDTH + 1.2 * len(names)
    height = max(HEIGHT / 2, 0.28 * len(groups) + 1)
    figure.set_size_inches(width, height)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    numbers = looks(list(groups))
    for axes, name in zip(panels, names, strict=True):
        every_score: list[float] = []
        for row, runs in enumerate(groups.values()):
            scores = list(by_seed(runs, metrics[name]).values())
            every_score += scores
            _draw_row(axes, row, scores, numbers[row])
        axes.set_xlabel(name)
        # Student's intervals may leave what a score can be, so the runs alone make the frame.
        if every_score:
            lowest = min(every_score)
            highest = max(every_score)
            room = 0.15 * (highest - lowest)
            if room:
                axes.set_xlim(lowest - room, highest + room)
    panels[0].set_yticks(range(len(groups)), list(groups))
    # From the top down, as the conditions stand in the tables.
    panels[0].set_ylim(len(groups) - 0.5, -0.5)


def _draw_row(axes: Any, row: int, scores: Sequence[float], number: int) -> None:
    """Draw a condition's runs, mean and interval at the height `row`, in the look `number`."""
    estimate = mean(scores)
    colour = style(number)["color"]
    axes.plot(scores, [row] * len(scores), "o", color=colour, markersize=3, alpha=0.35)
    # Fewer than three seeds have no interval.
    if not math.isnan(estimate.low):
        axes.hlines(row, estimate.low, estimate.high, color=colour, linewidth=2)
    if scores:
        axes.plot([estimate.mean], [row], marker(number), color=colour, markersize=6)


def noise_figure(axes: Any, simulation: Simulation) -> None:
    """Draw noise and signal of the log-ratio at the threshold over the latent dimensions."""
    # The embedded model comes last and by itself: its threshold is another one.
    *rows, embedded = simulation["at_threshold"]
    dimensions = [row["dimensions"] for row in rows]
    for colour, key, label in (
        (COLOURS[1], "noise", "noise, one sample"),
        (COLOURS[0], "signal", "signal, the exact KL"),
    ):
        values = [row[key] for row in rows]
        axes.loglog(dimensions, values, "o-", color=colour, label=label)
        look = {"color": colour, "fillstyle": "none"}
        there = f"{key} at the embedded model's threshold"
        axes.loglog([embedded["dimensions"]], [embedded[key]], "D", **look, label=there)
    axes.set_xlabel("latent dimensions")
    axes.set_ylabel("log-ratio, mean-reduced")
    _legend(axes)


def contradictions_figure(axes: Any, simulation: Simulation) -> None:
    """Draw the share of decisions that the exact divergence contradicts, each estimator with its
    best clip range.
    """
    for number, (label, rows) in enumerate(simulation["estimators"].items()):
        dimensions = [row["dimensions"] for row in rows]
        shares = [100 * row["contradicted"] for row in rows]
        axes.semilogx(dimensions, shares, "o", **style(number), label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("latent dimensions")
    axes.set_ylabel("contradicted decisions, % of terms that move away")
    _legend(axes)


def _outside(figure: Any) -> None:
    """Write the conditions' names beside the panel, where they cover no run."""
    if _has_labels(figure.axes[0]):
        figure.set_size_inches(WIDTH + 2, HEIGHT)
        figure.legend(loc="outside right upper")


def _legend(axes: Any) -> None:
    if _has_labels(axes):
        axes.legend()


def _has_labels(axes: Any) -> bool:
    """Tell whether something drawn has a name; matplotlib warns of a legend without any."""
    handles, _ = axes.get_legend_handles_labels()
    return bool(handles)


KINDS = {
    "paths": paths_figure,
    "curves": curves_figure,
    "speeds": speeds_figure,
    "dots": dots_figure,
}
SIMULATED = {"noise": noise_figure, "contradictions": contradictions_figure}
