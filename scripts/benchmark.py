"""Time training iterations against their bare parts, alternating in one process, and say where the
time goes.

    python scripts/benchmark.py                       # time: 10 iterations of the main job
    python scripts/benchmark.py --memory    # peak memory against steps and group size
    python scripts/benchmark.py --profile             # one iteration, operator by operator
    python scripts/benchmark.py sampler=flow_sde      # any override of train.py
    # On a GPU, SD3.5 Medium's size, 2 prompts x 16:
    python scripts/random_pipelines.py model=sd35_medium weights
    python scripts/benchmark.py experiment=flow_dppo_sd35 model.pretrained=weights \
        batch.prompts_per_iteration=2 \
        data.prompts.count=32 reward=jpeg_compressibility batch.max_micro_batch=8 --iterations 5
    # Its peak memory, a case for each value; --profile goes behind these words, too:
    python scripts/benchmark.py experiment=flow_dppo_sd35 model.pretrained=weights \
        batch.prompts_per_iteration=2 \
        data.prompts.count=32 reward=jpeg_compressibility --memory batch.max_micro_batch=4,8,16
    # On two GPUs, as train.py: trainer=ddp, or tuning=full trainer=fsdp
    python scripts/benchmark.py experiment=flow_dppo_sd35 trainer=ddp reward=jpeg_compressibility

The bare parts are the same transformer forwards and backwards, decodes and reward calls, batched as
the run batches them, in plain loops with nothing around them. Two iterations come first without
them. The first one's surplus over the median is what compiling, the gate and first calls cost; the
peak memory is that of the two, from the moment training starts: neither loading nor bare parts are
in it. On a GPU that is memory allocated to tensors; what PyTorch reserved for them stands beside
it, and what `scripts/plan_memory.py` predicts for the same configuration, evaluations left out.

In several processes each times the bare parts of its own share, which ask nothing of the others but
the weights that FSDP gathers in each pass. Of each iteration those of the slowest process are
compared with the longest time of the iteration: everything else is the run's own work, reductions
over processes, and waiting for each other. The peak is the largest of all processes, and the first
one prints.

The speed that the networks reach is given too, bare and over the run's phases: as a share of a
large matrix product's, measured here in the model's dtype and as `matmul_precision` rounds it, and
on a GPU that `flowrl/speed/gpus.py` knows as a share of its rating. Operations are those of
matrix products, convolutions and attention; recomputation counts as none.

`--profile` runs PyTorch's profiler over one iteration without bare parts. It keeps every operator,
so take few prompts. Operators that a scorer calls in a thread of its own have no names there.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback, Trainer
from omegaconf import DictConfig

from flowrl.callbacks.timing import ALONE, STRETCH, Alternate, Peak, Profile
from flowrl.cli.memory_plan import Plan
from flowrl.errors import UserError
from flowrl.launch.build import build
from flowrl.launch.checks import check_accelerator
from flowrl.launch.compose import compose
from flowrl.launch.errors import root_of
from flowrl.launch.quiet import quieten
from flowrl.models.loading import EMBEDDED
from flowrl.parallel.strategies import is_later_rank
from flowrl.speed.bare_parts import Seconds
from flowrl.speed.gpus import rating
from flowrl.speed.operations import utilisation
from flowrl.speed.trace import Breakdown, break_down
from flowrl.training.policy import Policy
from flowrl.values.units import GIB

STEPS_AND_GROUPS = ((6, 12), (12, 12), (24, 12), (6, 24), (6, 48))
"""The cases of the main job that are measured where none are asked for."""
SHORT_NAMES = {"rollout.num_steps": "steps", "batch.group_size": "group"}
TRACE = "trace.json.gz"
NUM_OPERATORS = 15


def fit(
    overrides: Sequence[str], num_iterations: int, callbacks: list[Callback]
) -> tuple[Policy, DictConfig]:
    """Train for some iterations, with nothing evaluated or written; return the policy and its
    configuration.
    """
    quieten()
    settings = ["name=benchmark", "logger=none", "evaluation.max_prompts=1"]
    cfg = compose([*settings, "embeddings.folder=null", *overrides])
    cfg.num_iterations = max(cfg.num_iterations, num_iterations)
    check_accelerator(cfg)
    policy, data, _ = build(cfg)
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        limit_train_batches=num_iterations,
    )
    trainer.fit(policy, datamodule=data)
    return policy, cfg


def predicted_gib(cfg: DictConfig) -> float | None:
    """Return the peak of a process that the planner predicts for a configuration, in GiB, without
    evaluations; None for one that it refuses.
    """
    # Its warning about casts concerns weights, of which there are none.
    diffusers.utils.logging.set_verbosity_error()
    try:
        plan = Plan(cfg)
        return plan.costs(plan.plan.micro_batch).training / GIB
    except (UserError, InstantiationException) as error:
        # A refusal by the model's class comes within an error of Hydra's.
        if isinstance(root_of(error), UserError):
            return None
        raise


def print_peak(peak: Peak, cfg: DictConfig) -> None:
    """Print the peak memory, and on a GPU what is to be compared with it."""
    print(f"peak memory                       {peak.allocated:.2f} GiB", flush=True)
    if peak.reserved is None:
        return
    print(f"peak memory reserved              {peak.reserved:.2f} GiB", flush=True)
    predicted = predicted_gib(cfg)
    words = "unknown" if predicted is None else f"{predicted:.2f} GiB (scripts/plan_memory.py)"
    print(f"peak memory predicted             {words}")


def report_utilisation(alternate: Alternate, num_samples: int, bare: Seconds) -> None:
    """Print how much of a large matrix product's speed the networks reach, and of the GPU's
    rating, and images per second of the two phases.

    A phase of the run is all it does: rollouts decode and wait for the last rewards, updates ask
    the reference.
    """
    operations = alternate.operations
    precision = torch.get_float32_matmul_precision()
    is_on_gpu = alternate.device.type == "cuda"
    how = []
    if is_on_gpu:
        how.append(str(alternate.dtype).removeprefix("torch."))
    if alternate.dtype == torch.float32 and (is_on_gpu or precision != "highest"):
        how.append(f"matmul_precision={precision}")
    print(
        f"a large matrix product            {alternate.best / 1e12:.3g} TFLOP/s"
        + "".join(f", {word}" for word in how)
    )
    yardsticks = {"": alternate.best}
    if is_on_gpu:
        yardsticks = yardsticks_of_card(alternate, precision)
    laps_of = {"rollout": ("rollout", "reward"), "update": ("update",)}
    parts_of = {"rollout": ("rollout", "decode"), "update": ("update", "reference")}
    for name in laps_of:
        took = statistics.median(
            sum(lap[f"perf/{phase}_seconds"] for phase in laps_of[name])
            for lap in alternate.laps[ALONE:]
        )
        whole = sum(operations[part] for part in parts_of[name])
        for words, speed in yardsticks.items():
            print(
                f"{name}: {num_samples / took:.2f} images/s, model FLOP utilisation "
                f"{utilisation(operations[name], bare[name], speed):.1%} bare, "
                f"{utilisation(whole, took, speed):.1%} in the run{words}"
            )


def yardsticks_of_card(alternate: Alternate, precision: str) -> dict[str, float]:
    """Return what speeds on a GPU are compared with, in operations a second, by its name."""
    name = torch.cuda.get_device_name(alternate.device)
    rated = rating(name, alternate.dtype, precision)
    measured = {" of a product measured here": alternate.best}
    if rated is None:
        print(f"{name}: no rating for these products is known here")
        return measured
    return {f" of the GPU's rating ({rated})": rated.speed} | measured


def time_table(overrides: Sequence[str], num_iterations: int) -> None:
    """Print what an iteration takes, and the share of its bare parts."""
    alternate = Alternate()
    peak = Peak()
    policy, cfg = fit(overrides, ALONE + num_iterations, [peak, alternate])
    if is_later_rank():
        return
    bare = alternate.bare
    first, *_ = alternate.whole
    whole = alternate.whole[ALONE:]
    laps = alternate.laps[ALONE:]
    median = {name: statistics.median(row[name] for row in bare) for name in bare[0]}
    total = statistics.median(whole)
    ratio = statistics.median(w / sum(b.values()) for w, b in zip(whole, bare, strict=True))
    rollout = statistics.median(
        # Scoring runs beside the rollout, so the two have one time.
        (lap["perf/rollout_seconds"] + lap["perf/reward_seconds"])
        / (b["rollout"] + b["decode"] + b["reward"])
        for lap, b in zip(laps, bare, strict=True)
    )
    print(
        f"{num_iterations} iterations of {policy.scouting.num_drawn} images, "
        f"{torch.get_num_threads()} threads; medians"
    )
    print(f"{'part':<34}{'seconds':>9}{'share':>8}")
    for name, value in median.items():
        print(f"{'bare ' + name:<34}{value:>9.3f}{value / total:>8.1%}")
    print(
        f"{'everything else':<34}{total - sum(median.values()):>9.3f}"
        f"{1 - sum(median.values()) / total:>8.1%}"
    )
    print(f"{'iteration':<34}{total:>9.3f}{1:>8.0%}")
    print(f"{'first iteration (compiling, ...)':<34}{first - total:>+9.3f}")
    print(f"images per second                 {policy.scouting.num_drawn / total:.1f}")
    print(f"iteration over bare parts         {ratio:.3f}")
    print(f"rollout with scoring over bare    {rollout:.3f}")
    print_peak(peak, cfg)
    report_utilisation(alternate, policy.plan.num_samples, median)


def cases_of(overrides: Sequence[str]) -> tuple[list[str], list[dict[str, str]]]:
    """Divide overrides into those that hold for all cases of memory, and the cases, by key: all
    combinations of the values of keys that are given several.

    Raises UserError where none is and the model is another than the main job's.
    """
    fixed = []
    choices = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([(key, value) for value in override.sweep_string_iterator()])
        else:
            fixed.append(str(override.input_line))
    if choices:
        return fixed, [dict(case) for case in itertools.product(*choices)]
    cfg = compose(["name=benchmark", *fixed])
    if not cfg.model.pretrained.startswith(EMBEDDED):
        raise UserError(
            "--memory: give a key several values, each of them a case, such as "
            "batch.max_micro_batch=4,8; the cases that are measured without are those of the "
            "embedded model"
        )
    return fixed, [
        dict(zip(SHORT_NAMES, map(str, numbers), strict=True)) for numbers in STEPS_AND_GROUPS
    ]


def memory_table(overrides: Sequence[str]) -> None:
    """Print the peak memory of each case, which is a process of its own."""
    fixed, cases = cases_of(overrides)
    names = [SHORT_NAMES.get(key, key) for key in cases[0]]
    rows = [list(case.values()) for case in cases]
    columns = zip(names, *rows, strict=True)
    widths = [max(6, 1 + max(map(len, column))) for column in columns]
    head = ["peak GiB"]
    if torch.cuda.is_available():
        head += ["reserved", "predicted"]
    print(in_columns(names, widths) + in_columns(head, [10] * len(head)))
    for case, row in zip(cases, rows, strict=True):
        words = [f"{key}={value}" for key, value in case.items()]
        command = [sys.executable, __file__, "--one-memory-case", *fixed, *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            # What failed, such as a device without memory, says so in its last line.
            measured = "  " + done.stderr.strip().rpartition("\n")[2]
        else:
            cells = json.loads(done.stdout.splitlines()[-1])
            measured = in_columns(cells, [10] * len(cells))
        print(in_columns(row, widths) + measured, flush=True)


def in_columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return a line of cells, each at the right of its column."""
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def one_memory_case(overrides: Sequence[str]) -> None:
    """Print the peak of one case and, on a GPU, what is reserved and what was predicted, in GiB."""
    peak = Peak()
    _, cfg = fit(overrides, ALONE, [peak])
    numbers: list[float | None] = [peak.allocated]
    if peak.reserved is not None:
        numbers += [peak.reserved, predicted_gib(cfg)]
    print(json.dumps(["-" if number is None else f"{number:.3f}" for number in numbers]))


def profile_table(overrides: Sequence[str], path: Path) -> None:
    """Print where one iteration's time goes, operator by operator, and write its trace."""
    if not path.parent.is_dir():
        raise UserError(f"--profile={path}: no such folder; make it, or choose another")
    profile = Profile()
    fit(overrides, ALONE + 1, [profile])
    if is_later_rank():
        return
    profile.profiler.export_chrome_trace(str(path))
    breakdown = break_down(profile.profiler.events(), STRETCH, has_device=profile.has_device)
    print_breakdown(breakdown, profile.plain_seconds)
    print(f"trace: {path}, for https://ui.perfetto.dev")


def print_breakdown(breakdown: Breakdown, plain_seconds: float) -> None:
    """Print the operators of an iteration that take longest, and when the device was idle."""
    took = breakdown.seconds
    print(f"an iteration took {took:.3f} seconds under the profiler, {plain_seconds:.3f} without")
    place = "the CPU"
    rest = "in no operator (Python)"
    if idle := breakdown.idle:
        place = "the GPU"
        rest = "kernels of no operator here"
        print(
            f"the GPU had nothing to do {idle.total / took:.1%} of it, in {idle.num_gaps} gaps of "
            f"at most {idle.longest:.6f} seconds"
        )
    shown = breakdown.operators[:NUM_OPERATORS]
    others = breakdown.operators[NUM_OPERATORS:]
    print(f"{'operator, itself on ' + place:<50}{'seconds':>9}{'share':>8}{'calls':>9}")
    rows = [(operator.name, operator.seconds, operator.num_calls) for operator in shown]
    rows.append(
        (
            f"{len(others)} others",
            sum(operator.seconds for operator in others),
            sum(operator.num_calls for operator in others),
        )
    )
    for name, seconds, num_calls in rows:
        print(f"{name[:49]:<50}{seconds:>9.3f}{seconds / took:>8.1%}{num_calls:>9}")
    print(f"{rest:<50}{breakdown.rest:>9.3f}{breakdown.rest / took:>8.1%}")


def main() -> None:
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="configuration overrides, as for train.py")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--profile", nargs="?", const=TRACE, metavar="FILE", help=f"its trace, {TRACE} by default"
    )
    parser.add_argument("--one-memory-case", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    overrides = args.overrides
    trace = args.profile
    if trace and "=" in trace:
        # An override behind --profile, which is no file.
        overrides = [trace, *overrides]
        trace = TRACE
    if args.iterations < 1:
        raise UserError(f"--iterations={args.iterations} must be at least 1")
    if args.one_memory_case:
        one_memory_case(overrides)
    elif args.memory:
        memory_table(overrides)
    elif trace:
        profile_table(overrides, Path(trace))
    else:
        time_table(overrides, args.iterations)


if __name__ == "__main__":
    raise SystemExit(run_program(main, computes=True))
