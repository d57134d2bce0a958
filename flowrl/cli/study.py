"""Run, collect and write up a study.

    python scripts/study.py plan methods
    python scripts/study.py run methods
    python scripts/study.py reproduce --quick

Actions:
  plan       what there is to run, what of it is over
  run        start or continue the study's runs, below outputs/studies/<study>/runs
  collect    take what is over into experiments/<study>/results.json, and its sample grids
  render     fill the READMEs' tables and draw the figures, from results.json alone
  reproduce  all of it from nothing, below outputs/reproduce/<commit>, beside the record; with
             --quick reduced. What a study takes from another's tuning is that of the same folder,
             or else of the committed record. Without --quick the studies must be named: all of
             them take half a day

Ctrl-C or SIGTERM stops the runs after their iteration; the same command goes on. A run in
results.json is over for good, so a study may take many sittings: collect and commit after each.
"""

from flowrl.launch.program import run_program

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.runs.command_line import key_of
from flowrl.runs.commits import flowrl_commit, short
from flowrl.runs.installation import REPOSITORY
from flowrl.studies.analysis import conditions
from flowrl.studies.choice import choose
from flowrl.studies.document import fill, page, pieces, samples_page, slug
from flowrl.studies.figures import draw
from flowrl.studies.place import TUNED, Place
from flowrl.studies.plan import ORDER, Planned, Study
from flowrl.studies.record import load, write
from flowrl.sweep.job import JobsFailed
from flowrl.sweep.plan import match, write_sweep
from flowrl.sweep.pool import Pool, find_slots

ROOT = REPOSITORY or Path.cwd()
"""The folder with experiments/: the checkout, or for an installed package the working directory."""
PLANS = ROOT / "experiments"
QUOTING = (ROOT / "docs" / "how-to" / "recipes.md",)
"""Pages elsewhere that quote studies."""

GRACE = 60.0
REFRESH = 2.0


def place(action: str, is_quick: bool) -> Place:
    """Say where a study's runs and results are written."""
    outputs = ROOT / "outputs"
    if action != "reproduce" and not is_quick:
        return Place(PLANS, outputs / "studies", PLANS)
    # By commit, so that runs of other code are not taken for a reproduction.
    name = "quick" if is_quick else "reproduce"
    folder = outputs / name / short(flowrl_commit() or "unknown", 12)
    return Place(PLANS, folder, folder, is_quick=is_quick)


def show_plan(where: Place, study: Study) -> None:
    """Print how many runs each stage has, and how many of them are over."""
    planned = where.planned(study)
    records = where.find(study.name, planned)
    print(
        f"{study.name}: {study.num_runs} runs, about {study.hours:.1f} hours on two cores; "
        f"{len(records)} are over"
    )
    for stage in study.stages:
        runs = [run for run in planned if run.stage == stage.name]
        over = sum(run in records for run in runs)
        late = stage.num_runs - len(runs)
        waits = f", {late} wait for the tuning of {stage.tuned}" if late else ""
        print(f"  {stage.name}: {over} of {stage.num_runs} over, {stage.seconds:.0f} s each{waits}")


def run(
    where: Place, study: Study, slots: int | None, is_retry: bool, asked: Sequence[str] = ()
) -> None:
    """Run every stage to its end, or those that are asked for; the next one begins when the one
    before is over. Raises UserError for a stage that the study does not have.
    """
    names = [stage.name for stage in study.stages]
    for name in asked:
        if name not in names:
            raise UserError(f"--stage {name}: {study.name} has the stages {', '.join(names)}")
    for stage in study.stages:
        if asked and stage.name not in asked:
            continue
        runs = stage.runs(where.chosen(stage.tuned) if stage.tuned else {})
        sweep(where, study, runs, slots, is_retry)
        if stage.chooses:
            chosen = choose(stage, runs, where.find(study.name, runs))
            path = where.root / study.name / TUNED
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(chosen, indent=2) + "\n")
            print(f"{study.name}: tuned, see {path}")


def sweep(
    where: Place, study: Study, runs: Sequence[Planned], slots: int | None, is_retry: bool
) -> None:
    """Run what is not over. Raises JobsFailed where something has ended without a result."""
    records = where.find(study.name, runs)
    over = {
        run for run, record in records.items() if not (is_retry and record["status"] == "failed")
    }
    missing = [run for run in runs if run not in over]
    if not missing:
        return
    folder = where.runs(study.name)
    sizes = [(1, length(run)) for run in missing]
    jobs = match(folder, [run.overrides for run in missing], sizes)
    write_sweep(folder, jobs, is_new=False)
    devices = find_slots(slots, 0, len(jobs))
    print(
        f"{study.name}, {runs[0].stage}: {len(missing)} of {len(runs)} runs, {len(devices.names)} "
        f"at a time, {folder}"
    )
    Pool(devices, is_fail_fast=False, grace=GRACE, refresh=REFRESH, group=study.name).run(jobs)
    if lost := len(missing) - len(where.find(study.name, missing)):
        raise JobsFailed(
            f"{lost} runs ended without a result; see job.log in the folders below {folder}"
        )


def length(planned: Planned) -> int:
    """Return the number of iterations that a run's overrides say, 0 where they say none."""
    for override in planned.overrides:
        if key_of(override) == "num_iterations":
            return int(override.partition("=")[2])
    return 0


def collect(where: Place, study: Study) -> None:
    """Write results.json from what is over, and copy the sample grids of the first seed."""
    records = where.find(study.name, where.planned(study))
    results = {"study": study.name, "tuned": where.tuned(study)}
    if study.simulation:
        results["simulation"] = simulated(study, load(where.results(study.name)).get("simulation"))
    write(where.results(study.name), results | {"runs": list(records.values())})
    folders = where.every_folder
    samples = where.results(study.name).parent / "samples"
    for planned in records:
        folder = folders.get(frozenset(planned.overrides))
        is_shown = planned.stage in study.report["stages"] and planned.seed == first_seed(study)
        if is_shown and folder and (grids := sorted((folder / "images").glob("[0-9]*.png"))):
            samples.mkdir(exist_ok=True)
            shutil.copyfile(grids[-1], samples / f"{slug(planned.condition)}.png")
    print(f"{study.name}: {len(records)} of {study.num_runs} runs in {where.results(study.name)}")


def simulated(study: Study, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Return what is computed without runs, kept while its setting is; delete results.json to
    compute it anew.
    """
    if earlier and earlier["setting"] == study.simulation:
        return earlier
    from flowrl.studies.ratio_noise.simulation import simulate  # PyTorch

    return simulate(study.simulation)


def first_seed(study: Study) -> int:
    """Return the seed whose sample grids are shown."""
    return next(stage.seeds[0] for stage in study.stages if stage.name in study.report["stages"])


def render(where: Place, names: Sequence[str]) -> None:
    """Fill all pages that show the records of experiments/; of others write one page a study."""
    studies = {name: where.study(name) for name in names}
    records = {name: load(where.results(name)) for name in names}
    filled = {name: pieces(study, records[name]) for name, study in studies.items()}
    for name, study in studies.items():
        render_one(study, records[name], where.results(name).parent)
    if where.records == PLANS:
        pages = [folder / "README.md" for folder in (PLANS, *map(PLANS.joinpath, names))]
        for path in [*pages, *QUOTING]:
            path.write_text(fill(path.read_text(), filled))
        print(
            f"experiments/README.md, docs/how-to/recipes.md and the pages of {', '.join(names)} "
            "are filled, figures and samples.md with them"
        )


def render_one(study: Study, results: dict[str, Any], folder: Path) -> None:
    """Draw a study's figures and write its pages; results.md only where no README is filled."""
    if results["runs"] or results.get("simulation"):
        draw(study, results, folder / "figures")
        write_samples_page(study, results["runs"], folder)
    if folder.parent != PLANS and folder.is_dir():
        (folder / "results.md").write_text(page(study, results))
        print(f"{study.name}: {folder / 'results.md'}")


def write_samples_page(study: Study, runs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write samples.md for the conditions that have a sample grid, if any has."""
    labels = conditions(runs, study.report["stages"])
    shown = [label for label in labels if (folder / "samples" / f"{slug(label)}.png").is_file()]
    if shown:
        score = study.report.get("score", "headline score")
        text = samples_page(study.name, shown, first_seed(study), score)
        (folder / "samples.md").write_text(text)


def check_names(args: argparse.Namespace, where: Place) -> None:
    """Raise UserError where all studies would be reproduced because none is named."""
    if args.action == "reproduce" and not (args.studies or args.quick):
        hours = sum(where.study(name).hours for name in ORDER)
        raise UserError(
            f"reproduce: name the studies; all of them ({', '.join(ORDER)}) take {hours:.0f} hours"
        )


def main() -> None:
    """Do what the action says, one study after the other."""
    # Options may stand between action and studies.
    args = arguments.study().parse_intermixed_args()
    start = time.monotonic()
    if not PLANS.is_dir():
        raise UserError(f"{PLANS}: no studies there; call this in a checkout of FlowRL")
    where = place(args.action, args.quick)
    check_names(args, where)
    steps = ("run", "collect", "render") if args.action == "reproduce" else (args.action,)
    names = args.studies or list(ORDER)
    for name in names:
        study = where.study(name)
        if "plan" in steps:
            show_plan(where, study)
        if "run" in steps:
            run(where, study, args.slots, args.retry, args.stage)
        if "collect" in steps:
            collect(where, study)
    if "render" in steps:
        render(where, names)
    if "run" in steps:
        print(f"{', '.join(names)}: {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(run_program(main, computes=True))
