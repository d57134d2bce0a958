"""Check a configuration without training: its names, values, rules, prompts, servers and files.

    flowrl check sampler=cps loss=dppo
    flowrl check experiment=flow_dppo_sd35 data=text data.prompts.path=prompts.txt
    flowrl check --config-dir conf -m reward=mine loss=dppo,grpo

It takes what `flowrl train` takes, and tells what would be trained. No weights are loaded, and
nothing is written. Exit status 1, and one line, for what training would refuse before it loads any.
With -m all jobs of a sweep are checked; of a search, such as hydra/sweeper=search, the ends of its
ranges.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.launch.build import prepare
from flowrl.launch.checks import check_accelerator
from flowrl.launch.compose import compose
from flowrl.launch.door import examine
from flowrl.launch.hub_files import describe_files
from flowrl.launch.lora_keys import take_from_file
from flowrl.launch.search_path import with_config_dir
from flowrl.launch.sweep_jobs import Jobs, jobs_of
from flowrl.objectives import num_trained
from flowrl.training.scouting import Scouting
from flowrl.values.plural import counted

TOLD = (
    "model",
    "tuning",
    "sampler",
    "loss",
    "penalty",
    "regularizer",
    "reward",
    "data",
    "trainer",
    "logger",
)
"""The groups whose options and targets are told."""


def check(overrides: Sequence[str]) -> list[str]:
    """Check one configuration as a launch does before it loads weights, and say what it is.

    Raises UserError for what a launch refuses.
    """
    cfg = compose(["name=check", *overrides], with_hydra=True)
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    if cfg.resume:
        raise UserError(
            f"resume={cfg.resume}: a run is checked by its resumption itself, before anything is "
            "written; check what a new run is given"
        )
    take_from_file(cfg, overrides)
    examine(cfg)
    check_accelerator(cfg)
    prepared = prepare(cfg)
    rows = [(name, _option(cfg, choices, name)) for name in TOLD]
    prompts = prepared.data.prompts
    source = cfg.data.prompts.get("path") or cfg.data.prompts.get("_target_")
    rows.append(("prompts", f"{counted(len(prompts), 'prompt')} of {source}"))
    evaluator = prepared.evaluator
    rows += [(f"evaluated {name}", evaluator.describe(name)) for name in evaluator.sets]
    rows.append(("iterations", str(cfg.num_iterations)))
    steps = num_trained(prepared.algorithm, seed=cfg.seed)
    plan = [prepared.plan.describe(steps)]
    plan += Scouting(prepared.scouting, prepared.plan).describe()
    if prepared.regularizer is not None:
        plan.append(prepared.regularizer.describe(steps))
    return [*(f"  {name:<30} {text}" for name, text in rows), *plan, *_files(cfg)]


def _option(cfg: DictConfig, choices: Any, name: str) -> str:
    """Write a group's option, and the target that it names."""
    target = OmegaConf.select(cfg, f"{name}._target_")
    return str(choices.get(name)) + (f" ({target})" if target else "")


def _files(cfg: DictConfig) -> list[str]:
    """Write where the weights are that the configuration names."""
    return [f"  {text}" for text in dict.fromkeys(describe_files(cfg))]


def run(words: Sequence[str], added: Sequence[str], *, is_sweep: bool) -> None:
    """Check a run, or each job of a sweep; tell of the first what it is. `added` are overrides of
    all.
    """
    jobs = jobs_of(words, added) if is_sweep else Jobs([list(words)])
    if jobs.sweeper:
        print(f"{jobs.sweeper} draws its jobs; what is checked is the ends of its ranges")
    for number, job in enumerate(jobs.overrides):
        if is_sweep:
            print(f"job {number}: {' '.join(job)}", flush=True)
        lines = check([*job, *added])
        if number == 0:
            print("\n".join(lines), flush=True)
    amount = f", all {counted(len(jobs.overrides), 'job')}" if is_sweep else ""
    print(f"ok{amount}: nothing that training would refuse before it loads weights")


def main() -> None:
    """Read the command line, and check."""
    args = arguments.check().parse_intermixed_args()
    # Those that the folder stands for: what was typed is told job by job.
    added = with_config_dir(args.overrides, args.config_dir)[len(args.overrides) :]
    run(args.overrides, added, is_sweep=args.multirun)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
