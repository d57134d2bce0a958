"""Build the project's W&B workspace and report from code: python scripts/dashboard.py --entity me
--project flowrl

Needs wandb-workspaces (pip install 'flowrl-lightning[dashboard]'). With --dry-run nothing is sent:
both are written as JSON.
"""

from flowrl.launch.program import run_program

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flowrl.runs.glossary import is_known

SETS = ("held_in", "held_out")
STEPS = r"trust/kl_old/\d+"


def curves(wr: Any) -> dict[str, list[Any]]:
    """Make panels over the iteration by their section's title: the mean of each condition's seeds,
    and their range.

    Runs that differ in anything else are of another condition, so no ablation is averaged away.
    """

    def line(
        *names: str, title: str | None = None, regex: str | None = None, **options: Any
    ) -> Any:
        unknown = [name for name in names if not is_known(name)]
        assert not unknown, unknown
        shared = {
            "x": "iteration",
            "groupby": wr.Config("condition"),
            "groupby_rangefunc": "minmax",
        }
        return wr.LinePlot(
            title=title or names[0], y=list(names), metric_regex=regex, **shared, **options
        )

    return {
        "Reward": [
            line("reward/mean"),
            *(line(f"eval/{name}/reward") for name in SETS),
            line("reward/missing"),
        ],
        "Trust region": [
            line("trust/kl_old", log_y=True),
            line("trust/masked_fraction"),
            line("trust/delta", log_y=True),
            line("trust/tv_old_max"),
            line(title="KL to the old policy, by step of the grid", regex=STEPS, log_y=True),
        ],
        "Drift": [
            line("eval/held_in/kl_ref"),
            line("eval/held_in/diversity"),
            line("update/grad_norm"),
        ],
        "Speed": [line("perf/images_per_second")],
    }


def comparisons(wr: Any) -> list[Any]:
    """Make the panels of what runs end at: reward against KL to the reference, and the ablation of
    delta.
    """
    reward, kl = (wr.SummaryMetric(f"eval/held_in/{name}") for name in ("reward", "kl_ref"))
    delta = wr.Config("loss.delta")
    return [
        wr.ScatterPlot(title="Reward against KL to the reference", x=kl, y=reward),
        wr.ScatterPlot(title="Delta ablation: reward", x=delta, y=reward, log_x=True),
        wr.ScatterPlot(title="Delta ablation: KL to the reference", x=delta, y=kl, log_x=True),
    ]


def build(entity: str, project: str, sweep: str | None, is_dry: bool) -> tuple[Any, Any]:
    """Make the workspace and the report; `sweep` narrows the report to the runs of one."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    samples = wr.MediaBrowser(title="Samples, before and now", media_keys=["images"], num_columns=2)
    sections = [ws.Section(name="Comparison", panels=comparisons(wr), is_open=True)]
    sections += [
        ws.Section(name=name, panels=panels, is_open=True) for name, panels in curves(wr).items()
    ]
    sections.append(ws.Section(name="Samples", panels=[samples], is_open=True))
    workspace = ws.Workspace(entity=entity, project=project, name="FlowRL", sections=sections)

    def runs() -> list[Any]:
        filters = f"Config('sweep') == '{sweep}'" if sweep else ""
        # A run set that names its project looks it up on the server.
        place = {} if is_dry else {"entity": entity, "project": project}
        return [wr.Runset(name=sweep or "all runs", filters=filters, **place)]

    blocks = [
        wr.TableOfContents(),
        wr.H1("Comparison"),
        wr.PanelGrid(runsets=runs(), panels=comparisons(wr)),
    ]
    for name, panels in curves(wr).items():
        blocks += [wr.H1(name), wr.PanelGrid(runsets=runs(), panels=panels)]
    blocks += [wr.H1("Samples"), wr.PanelGrid(runsets=runs(), panels=[samples])]
    title = f"FlowRL: {sweep}" if sweep else "FlowRL"
    return workspace, wr.Report(
        entity=entity, project=project, title=title, blocks=blocks, width="fluid"
    )


def main() -> None:
    """Build both, and send them or write them to a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", default="flowrl")
    parser.add_argument("--sweep", help="a sweep's folder name: the report shows its runs alone")
    parser.add_argument(
        "--dry-run", type=Path, metavar="FOLDER", help="write workspace.json and report.json there"
    )
    args = parser.parse_args()
    try:
        workspace, report = build(args.entity, args.project, args.sweep, bool(args.dry_run))
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install 'flowrl-lightning[dashboard]'")
    if args.dry_run:
        args.dry_run.mkdir(parents=True, exist_ok=True)
        for name, document in (("workspace", workspace), ("report", report)):
            content = document._to_model().model_dump(by_alias=True, mode="json")
            (args.dry_run / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
        print(f"{args.dry_run}/workspace.json and report.json; nothing was sent")
        return
    for document in (workspace, report):
        document.save()
        print(document.url)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
