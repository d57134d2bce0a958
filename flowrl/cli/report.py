"""Compare runs on one offline page.

    python scripts/report.py outputs/2026-01-01/12-00-00-sweep
    python scripts/report.py outputs/a outputs/b --title "two losses" --out pages/losses
    python scripts/report.py outputs/studies --metrics eval/held_out/reward --baseline loss=grpo

Reads config.yaml, metrics.csv, summary.json and images/ of every run in or below the given folders.
Writes report.html, report.md and the tables as CSV.
"""

from flowrl.launch.program import run_program

from collections.abc import Container
from itertools import product

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.report.compare import Condition, conditions
from flowrl.report.page import render
from flowrl.report.runs import Run, find
from flowrl.report.tables import (
    Table,
    ablation_table,
    config_table,
    difference_table,
    effect_table,
    frontier_table,
    run_table,
)
from flowrl.values.plural import counted

DRIFT = ("kl_ref", "diversity")


def headlines(runs: list[Run]) -> list[str]:
    """Name the reward and the headline part of each evaluation set, then drift and diversity of the
    first; without evaluations, the training reward.
    """
    logged = dict.fromkeys(name for run in runs for name in run.metrics)
    sets = dict.fromkeys(name.split("/")[1] for name in logged if name.startswith("eval/"))
    parts = dict.fromkeys(run.config.get("evaluation.headline", "") for run in runs)
    scores = ["reward", *(f"part/{part}" for part in parts)]
    names = [f"eval/{prompts}/{score}" for prompts, score in product(sets, scores)]
    names += [f"eval/{prompts}/{score}" for prompts, score in product([*sets][:1], DRIFT)]
    return _in(names, logged) or _in(["reward/mean"], logged)


def _in(names: list[str], logged: Container[str]) -> list[str]:
    return [name for name in names if name in logged]


def frontier_axes(metrics: list[str]) -> list[tuple[str, str]]:
    """Pair each drift with the other metrics of its evaluation set; the first two pairs are
    drawn.
    """
    drifts = [name for name in metrics if name.endswith("/kl_ref")]
    others = [name for name in metrics if name not in drifts]
    pairs = product(drifts, others)
    return [(kl, name) for kl, name in pairs if kl.split("/")[:2] == name.split("/")[:2]][:2]


def tables_of(
    runs: list[Run], groups: list[Condition], metrics: list[str], baseline: str | None
) -> list[Table]:
    """Make the tables of the page, in their order."""
    tables = [ablation_table(groups, metrics)]
    if len(groups) > 1:
        tables.append(difference_table(groups, pick(groups, baseline), metrics))
        tables.append(effect_table(groups, metrics))
    tables += [frontier_table(groups, *axes) for axes in frontier_axes(metrics)[:1]]
    return [*tables, config_table(runs), run_table(runs, groups, metrics)]


def pick(groups: list[Condition], label: str | None) -> Condition:
    """Return the condition of that label, or the first. Raises UserError where there is none."""
    if label is None:
        return groups[0]
    for group in groups:
        if group.label == label:
            return group
    raise UserError(
        f"--baseline={label}: no such condition; choose one of "
        f"{', '.join(repr(g.label) for g in groups)}"
    )


def check_metrics(metrics: list[str], runs: list[Run]) -> None:
    """Raise UserError for a metric that no run has."""
    for name in metrics:
        if not any(name in run.metrics for run in runs):
            raise UserError(f"--metrics {name}: no run has it; see the head of a metrics.csv")


def main() -> None:
    """Write the page, its Markdown and the tables."""
    args = arguments.report().parse_args()
    runs = find(args.places)
    groups = conditions(runs)
    metrics = args.metrics or headlines(runs)
    check_metrics(metrics, runs)
    frontiers = frontier_axes(metrics)
    tables = tables_of(runs, groups, metrics, args.baseline)
    window = args.smooth or max(1, max(len(run.rows) for run in runs) // 40)
    title = args.title or args.places[0].resolve().name
    out = args.out or args.places[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.html").write_text(
        render(title, groups, tables, metrics=metrics, frontiers=frontiers, window=window)
    )
    (out / "report.md").write_text(
        f"# {title}\n\n" + "\n".join(table.markdown() for table in tables)
    )
    for table in tables:
        (out / f"{table.stem}.csv").write_text(table.csv())
    print(
        f"{counted(len(runs), 'run')} in {counted(len(groups), 'condition')}: "
        f"{out / 'report.html'}, report.md, "
        f"{len(tables)} tables as CSV"
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
