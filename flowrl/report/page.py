"""The report as one page: tables, curves, reward against KL, and each condition's last pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from flowrl.report.charts import curve_chart, curves, frontier_chart, style
from flowrl.report.compare import Condition
from flowrl.report.frame import document, embedded, paragraph, section
from flowrl.report.tables import Table
from flowrl.runs.glossary import GLOSSARY
from flowrl.statistics import FEWEST

HEADLINES = (
    "reward/mean",
    "trust/kl_old",
    "trust/masked_fraction",
    "update/grad_norm",
    "reward/missing",
    "perf/images_per_second",
)
"""Shown first, after the metrics that the tables compare; all others are folded away below."""
FRONTIER = (
    "Thin lines: single runs, from the base model on. Large dots: means of a condition's runs. "
    "Dashed: the frontier."
)
SAMPLES = (
    "The last grid of one run of each condition, of a seed that all have where there is one. Click "
    "to enlarge."
)


def render(
    title: str,
    groups: Sequence[Condition],
    tables: Sequence[Table],
    *,
    metrics: Sequence[str],
    frontiers: Sequence[tuple[str, str]],
    window: int,
) -> str:
    """The page; `frontiers` are pairs of metrics (KL, reward), `window` smooths curves."""
    runs = [run for group in groups for run in group.runs]
    logged = list(dict.fromkeys(name for run in runs for name in run.metrics))
    first = [name for name in (*metrics, *HEADLINES) if name in logged]
    rest = [name for name in logged if name not in (*first, "iteration", "samples")]
    shown = {
        table.stem: section(table.title, table.note, table.html()) for table in tables if table.rows
    }
    shown.pop("frontier", "")
    frontier = "".join(paragraph(t.note) + t.html() for t in tables if t.stem == "frontier")
    pareto = "".join(
        _figure(reward, f"over {kl}", frontier_chart(groups, kl, reward))
        for kl, reward in frontiers
    )
    smoothing = f", running means over {window} iterations" if window > 1 else ""
    note = (
        f"Mean over each condition's runs; the band spans its smallest and largest run{smoothing}."
    )
    parts = [
        paragraph(f"{len(runs)} runs in {len(groups)} conditions. {_caution(groups)}"),
        *(shown.pop(stem, "") for stem in ("ablation", "differences", "effects")),
    ]
    if pareto:
        parts.append(
            section("Reward against KL", FRONTIER, f"<div class=charts>{pareto}</div>{frontier}")
        )
    parts.append(
        section("Curves", note, f"<div class=charts>{_charts(groups, first, window)}</div>")
    )
    if others := _charts(groups, rest, window):
        parts.append(
            "<details><summary>All other metrics</summary><div "
            f"class=charts>{others}</div></details>"
        )
    if grids := _grids(groups):
        parts.append(section("Samples", SAMPLES, f"<div class=grids>{grids}</div>"))
    parts += shown.values()
    script = Path(__file__).with_suffix(".js").read_text()
    return document(title, _legend(groups), "".join(parts), script)


def _figure(title: str, meaning: str, content: str) -> str:
    caption = f"<figcaption><b>{escape(title)}</b> {escape(meaning)}</figcaption>"
    return f"<figure>{caption}{content}</figure>" if content else ""


def _charts(groups: Sequence[Condition], metrics: Sequence[str], window: int) -> str:
    drawn = ((name, curves(groups, name, window)) for name in metrics)
    return "".join(
        _figure(name, meaning(name), curve_chart(found)) for name, found in drawn if found
    )


def _legend(groups: Sequence[Condition]) -> str:
    keys = (
        f'<button data-style="s{i}"><i class="{style(i)}"></i>{escape(group.label)} '
        f"({len(group.runs)})</button>"
        for i, group in enumerate(groups)
    )
    return f"<nav title='Click to hide or show a condition'>{''.join(keys)}</nav>"


def _caution(groups: Sequence[Condition]) -> str:
    fewest = min((len({run.seed for run in group.runs}) for group in groups), default=0)
    if fewest < 3:
        return "Some conditions have fewer than three seeds: they have no interval."
    if fewest < FEWEST:
        return (
            f"With {fewest} seeds intervals are Student's, as for normal scores; more seeds would "
            "narrow them."
        )
    return ""


def _grids(groups: Sequence[Condition]) -> str:
    shared = set.intersection(*({run.seed for run in group.runs} for group in groups))
    figures = []
    for group in groups:
        run = next((run for run in group.runs if run.seed in shared), group.runs[0])
        if run.images:
            caption = f"{run.label}, seed {run.seed}, {run.images[-1].name}"
            picture = embedded(run.images[-1].read_bytes())
            figures.append(
                _figure(group.label, caption, f'<img alt="{escape(caption)}" src="{picture}">')
            )
    return "".join(figures)


def meaning(metric: str) -> str:
    """What the glossary says of a metric; a `*` stands for one part of the name."""
    parts = metric.split("/")
    for name, text in GLOSSARY.items():
        pattern = name.split("/")
        if len(pattern) == len(parts) and all(
            p in ("*", part) for p, part in zip(pattern, parts, strict=True)
        ):
            return text
    return ""
