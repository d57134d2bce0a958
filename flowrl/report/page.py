"""The report as one page: tables, curves, reward against KL, and each condition's last pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flowrl.report.charts import curve_chart, curves, frontier_chart, style
from flowrl.report.compare import Condition
from flowrl.report.frame import TEMPLATES, embedded, fill
from flowrl.report.runs import Run
from flowrl.report.tables import Table
from flowrl.runs.glossary import GLOSSARY
from flowrl.statistics import FEWEST
from flowrl.values.plural import counted

HEADLINES = (
    "reward/mean",
    "trust/kl_old",
    "trust/masked_fraction",
    "update/grad_norm",
    "reward/missing",
    "perf/images_per_second",
)
"""Shown first, after the metrics that the tables compare; all others are folded away below."""


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it, below the name of its metric and what that means."""

    title: str
    meaning: str
    svg: Markup


@dataclass(frozen=True)
class Picture:
    """The last grid of one run of a condition; `address` holds the picture itself."""

    condition: str
    caption: str
    address: str


def render(
    title: str,
    groups: Sequence[Condition],
    tables: Sequence[Table],
    *,
    metrics: Sequence[str],
    frontiers: Sequence[tuple[str, str]],
    window: int,
) -> str:
    """Return the page as HTML; `frontiers` are pairs of metrics (KL, reward), `window` smooths
    curves.

    `metrics` are those that the tables compare, whose curves come first. Tables without rows are
    left out.
    """
    runs = [run for group in groups for run in group.runs]
    legend = [(group.label, len(group.runs), style(i)) for i, group in enumerate(groups)]
    num_runs = counted(len(runs), "run")
    num_conditions = counted(len(groups), "condition")
    first, others = _shown(runs, metrics)
    return fill(
        TEMPLATES / "report.html",
        title=title,
        legend=legend,
        counts=f"{num_runs} in {num_conditions}",
        caution=_caution(groups),
        tables={table.stem: table for table in tables if table.rows},
        frontiers=_frontiers(groups, frontiers),
        curves=_charts(groups, first, window),
        others=_charts(groups, others, window),
        window=window,
        pictures=_pictures(groups),
    )


def _shown(runs: Sequence[Run], metrics: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the logged metrics that are shown first, and all others."""
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    first = [name for name in (*metrics, *HEADLINES) if name in logged]
    # The two that count are no curves: they rise by the same steps in every run.
    shown = {*first, "iteration", "samples"}
    others = [name for name in logged if name not in shown]
    return first, others


def _frontiers(groups: Sequence[Condition], pairs: Sequence[tuple[str, str]]) -> list[Chart]:
    """Draw reward against KL for each pair of metrics that any run has."""
    charts = []
    for kl, reward in pairs:
        if svg := frontier_chart(groups, kl, reward):
            charts.append(Chart(reward, f"over {kl}", svg))
    return charts


def _charts(groups: Sequence[Condition], metrics: Sequence[str], window: int) -> list[Chart]:
    """Draw the curves of each metric, where any condition has one."""
    charts = []
    for name in metrics:
        drawn = curves(groups, name, window)
        if drawn:
            charts.append(Chart(name, meaning(name), curve_chart(drawn)))
    return charts


def _caution(groups: Sequence[Condition]) -> str:
    """Say what intervals of few seeds mean; nothing where there are enough."""
    nums_seeds = [len({run.seed for run in group.runs}) for group in groups]
    fewest = min(nums_seeds, default=0)
    if fewest < 3:
        return "Some conditions have fewer than three seeds: they have no interval."
    if fewest < FEWEST:
        return (
            f"With {fewest} seeds intervals are Student's, as for normal scores; more seeds would "
            "narrow them."
        )
    return ""


def _pictures(groups: Sequence[Condition]) -> list[Picture]:
    """Read each condition's last picture, of one seed throughout where there is such."""
    seeds = [{run.seed for run in group.runs} for group in groups]
    shared = set.intersection(*seeds)
    pictures = []
    for group in groups:
        run = next((run for run in group.runs if run.seed in shared), group.runs[0])
        if not run.images:
            continue
        last = run.images[-1]
        caption = f"{run.label}, seed {run.seed}, {last.name}"
        pictures.append(Picture(group.label, caption, embedded(last.read_bytes())))
    return pictures


def meaning(metric: str) -> str:
    """Return what the glossary says of a metric, nothing for an unknown one; a `*` there stands for
    one segment of the name.
    """
    segments = metric.split("/")
    for name, text in GLOSSARY.items():
        pattern = name.split("/")
        if len(pattern) == len(segments) and all(map(_is_alike, pattern, segments)):
            return text
    return ""


def _is_alike(pattern: str, segment: str) -> bool:
    """Tell whether a segment of a metric's name is the glossary's, or stands for any."""
    return pattern in ("*", segment)
