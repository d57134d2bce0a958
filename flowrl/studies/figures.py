"""A study's figures as PNG and SVG, in the colours of the report's charts. Only here is matplotlib
imported.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl.report.charts import Point, columns
from flowrl.statistics import average, mean
from flowrl.studies.analysis import Runs, by_seed, conditions, course
from flowrl.studies.plan import Study
from flowrl.studies.record import Metric, Record, mean_of

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
"""Each of these has its colour in every figure in which no method has more variants than there are
markers.
"""
CAPTIONS = {
    "paths": (
        "Bold: means over runs at each evaluation, from the base model to the mark at the end of "
        "training; thin: the runs."
    ),
    "curves": "Means over runs; the band holds all of them. Images: drawn for training.",
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


def figure_names(study: Study, results: Mapping[str, Any]) -> list[str]:
    """Name the figures that a record can give."""
    drawn = study.report.get("figures", {})
    return [
        name
        for name, spec in drawn.items()
        if spec["kind"] in SIMULATED or _groups(study, spec, results)
    ]


def _groups(
    study: Study, spec: Mapping[str, Any], results: Mapping[str, Any]
) -> Mapping[str, Runs]:
    return conditions(results["runs"], spec.get("stages", study.report["stages"]))


def fingerprint(study: Study, results: Mapping[str, Any]) -> str:
    """Return a digest of the record that a figure is drawn from, and of how; it stands in the file,
    so that a stale figure can be told.
    """
    drawn = [study.report.get(key) for key in ("stages", "metrics", "figures")]
    return hashlib.sha256(json.dumps([results, drawn], sort_keys=True).encode()).hexdigest()[:16]


def draw(study: Study, results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every figure of a study; return the paths."""
    import matplotlib
    from matplotlib.figure import Figure

    paths: list[Path] = []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in figure_names(study, results):
            spec = study.report["figures"][name]
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            if spec["kind"] in SIMULATED:
                SIMULATED[spec["kind"]](figure.subplots(), results["simulation"])
            else:
                KINDS[spec["kind"]](
                    figure, _groups(study, spec, results), study.report["metrics"], spec
                )
            origin = {"Description": fingerprint(study, results)}
            # Without a date and a version, so that the same record gives the same file.
            for suffix, unwanted in (("png", "Software"), ("svg", "Date")):
                paths.append(folder / f"{name}.{suffix}")
                figure.savefig(paths[-1], dpi=150, metadata={**origin, unwanted: None})
    return paths


def looks(labels: Sequence[str]) -> list[int]:
    """Return a number for each condition, that of its colour and, in steps of so many colours, of
    its dash and marker.

    It is the method's own colour where that tells all conditions apart; else they have one after
    the other.
    """
    methods = [label.split(" ", 1)[0] for label in labels]
    if not set(methods) <= set(METHODS) or max(map(methods.count, methods)) > len(MARKERS):
        return list(range(len(labels)))
    numbers = []
    for i, method in enumerate(methods):
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


def paths_figure(
    figure: Any, groups: Mapping[str, Runs], metrics: Mapping[str, Any], spec: Mapping[str, str]
) -> None:
    """Draw each condition's way from the base model to its end: its runs thin, their mean bold."""
    axes = figure.subplots()
    for number, (label, runs) in zip(looks(list(groups)), groups.items(), strict=True):
        ways = [course(run, metrics[spec["x"]], metrics[spec["y"]]) for run in runs]
        for way in ways:
            axes.plot(*zip(*way, strict=True), **style(number), linewidth=0.6, alpha=0.25)
        if full := [way for way in ways if way and len(way) == max(map(len, ways))]:
            centre = [_centre(points) for points in zip(*full, strict=True)]
            axes.plot(*zip(*centre, strict=True), **style(number), linewidth=1.6)
            end = {"color": style(number)["color"], "markersize": 7, "label": label}
            axes.plot(*centre[-1], marker(number), **end)
    axes.set_xlabel(spec["x"])
    axes.set_ylabel(spec["y"])
    _outside(figure)


def _centre(points: Sequence[Point]) -> Point:
    xs, ys = zip(*points, strict=True)
    return average(xs), average(ys)


def curves_figure(
    figure: Any, groups: Mapping[str, Runs], metrics: Mapping[str, Any], spec: Mapping[str, str]
) -> None:
    """Draw a score over the images drawn for training: the mean over runs, and the band from the
    smallest to the largest.
    """
    axes = figure.subplots()
    for number, (label, runs) in zip(looks(list(groups)), groups.items(), strict=True):
        values_at = columns(_scores(run, metrics[spec["y"]]) for run in runs)
        # A mean over other runs than the one before it would move for that alone.
        full = [
            (images, values)
            for images, values in values_at
            if len(values) == len(runs) and not math.isnan(sum(values))
        ]
        images_drawn = [images for images, _ in full]
        lowest = [min(values) for _, values in full]
        highest = [max(values) for _, values in full]
        band = {"color": style(number)["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(images_drawn, lowest, highest, **band)
        means = [average(values) for _, values in full]
        axes.plot(images_drawn, means, **style(number), label=label)
    axes.set_xlabel("images")
    axes.set_ylabel(spec["y"])
    _outside(figure)


def _scores(run: Record, metric: Metric) -> list[Point]:
    """Return (images drawn for training, score) of a run's evaluations."""
    images = run["images"]
    iterations = max(run["iterations"], 1)
    return [
        (row["iteration"] * images / iterations, mean_of(row, metric)) for row in run["evaluations"]
    ]


def dots_figure(
    figure: Any, groups: Mapping[str, Runs], metrics: Mapping[str, Any], spec: Mapping[str, Any]
) -> None:
    """Draw one panel a metric: each condition's mean over seeds with its 95 % interval, and its
    runs as faint dots.
    """
    names: Sequence[str] = spec["metrics"]
    figure.set_size_inches(WIDTH + 1.2 * len(names), max(HEIGHT / 2, 0.28 * len(groups) + 1))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    numbers = looks(list(groups))
    for axes, name in zip(panels, names, strict=True):
        ends: list[float] = []
        for row, runs in enumerate(groups.values()):
            values = list(by_seed(runs, metrics[name]).values())
            ends += values
            estimate = mean(values)
            colour = style(numbers[row])["color"]
            axes.plot(values, [row] * len(values), "o", color=colour, markersize=3, alpha=0.35)
            if not math.isnan(estimate.low):
                axes.hlines(row, estimate.low, estimate.high, color=colour, linewidth=2)
            if values:
                axes.plot([estimate.mean], [row], marker(numbers[row]), color=colour, markersize=6)
        axes.set_xlabel(name)
        # Student's intervals may leave what a score can be.
        if ends and (room := 0.15 * (max(ends) - min(ends))):
            axes.set_xlim(min(ends) - room, max(ends) + room)
    panels[0].set_yticks(range(len(groups)), list(groups))
    panels[0].set_ylim(len(groups) - 0.5, -0.5)


def noise_figure(axes: Any, simulation: Mapping[str, Any]) -> None:
    """Draw noise and signal of the log-ratio at the threshold over the latent dimensions."""
    *rows, embedded = simulation["at_threshold"]
    dimensions = [row["dimensions"] for row in rows]
    for colour, key, label in (
        (COLOURS[1], "noise", "noise, one sample"),
        (COLOURS[0], "signal", "signal, the exact KL"),
    ):
        axes.loglog(dimensions, [row[key] for row in rows], "o-", color=colour, label=label)
        look = {"color": colour, "fillstyle": "none"}
        there = f"{key} at the embedded model's threshold"
        axes.loglog([embedded["dimensions"]], [embedded[key]], "D", **look, label=there)
    axes.set_xlabel("latent dimensions")
    axes.set_ylabel("log-ratio, mean-reduced")
    _legend(axes)


def contradictions_figure(axes: Any, simulation: Mapping[str, Any]) -> None:
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
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.set_size_inches(WIDTH + 2, HEIGHT)
        figure.legend(loc="outside right upper")


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


KINDS = {"paths": paths_figure, "curves": curves_figure, "dots": dots_figure}
SIMULATED = {"noise": noise_figure, "contradictions": contradictions_figure}
