"""Estimate a run's GPU memory per phase, and the largest micro-batch that fits: no weights, no GPU.

    python scripts/plan_memory.py model=sd35_medium --gpu 24
    python scripts/plan_memory.py experiment=flow_grpo_sd35 reward=pickscore --gpu 16,24,80
    python scripts/plan_memory.py model=flux2_klein_4b tuning=full --gpu 80
    python scripts/plan_memory.py experiment=flow_dppo_flux2 batch.num_processes=8 --gpu 80
    python scripts/plan_memory.py experiment=flow_grpo_z_image --gpu 24 --tflops 165 --price 0.4

Columns: `all along` and, on top of it, an evaluation or what an `iteration` holds of its samples;
on top of that the largest of rollout, decoding, update and optimizer step. The largest models take
minutes.

The networks are built on PyTorch's meta device and run there, forwards and backwards as a run
would; what each operation allocates and frees is counted, with attention as a fused kernel keeps
it. Kernels' own workspace is not counted, so a share of the GPU is kept free. Of scorers the
weights are counted, where their networks are known, and not their passes: with loss=draft, whose
gradients go through decoding and the scorer, an update takes more than the table says by what the
scorer keeps. Of loss=opd the teachers' LoRAs are read and counted, and their pass as if all samples
were those of the teacher whose pass takes most; a teacher without a LoRA yet, as recipes leave it
open, is taken to be as large as the LoRA that is trained. trainer=ddp adds the buckets of its
reduction; trainer=fsdp divides weights, gradients and optimizer state over `batch.num_processes`
and makes blocks whole for a pass, of which an upper bound is counted.

A network that can recompute its blocks in updates has a table with that and one without, as
configured first. How much longer an iteration takes with it is predicted from the floating-point
operations of matrix products and convolutions alone, without the scorer's. For each GPU it
proposes what should be fastest of all that fits: without recomputing where the rows that fit, or
all that there are, have 4,096 tokens, or are half as many as with it. No GPU has measured that
rule. Either way nothing changes but memory and speed.

With --tflops, a GPU's rating in dense products of the model's dtype, the hours of the run are
predicted too, as if the operations of all its iterations were done at a share of that rating:
--share, 0.2 to 0.4 unless it is given. No GPU has measured that share. Evaluations, the scorer,
restoring quantised weights and all that is no matrix product are left out. --price makes it money.

Of model=derived prompts are counted as long as they may be, model.call.max_sequence_length.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import diffusers
from omegaconf import DictConfig

from flowrl.cli import arguments
from flowrl.cli.memory_plan import Plan
from flowrl.cli.plan_costs import TERA, Choice, Costs, Pace, enough, fastest
from flowrl.cli.plan_teachers import named, unnamed
from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.launch.search_path import with_config_dir
from flowrl.launch.validate import validate
from flowrl.values.sizes import in_words
from flowrl.values.units import GIB

SPARE = 0.08
"""Share of the GPU left to the CUDA context, kernels' workspace and fragmentation."""

COLUMNS = ("all along", "iteration", "rollout", "decode", "update", "step", "evaluation", "peak")
CHECKPOINTING = "backend.gradient_checkpointing"

Tables = Mapping[bool, Mapping[int, Costs]]
"""The costs by rows, with gradient checkpointing and without."""


def room_of(gpu: float) -> float:
    """Return the bytes of a GPU of so many GiB that a run may take."""
    return gpu * (1 - SPARE) * GIB


def paces(
    gpus: Sequence[float],
    tflops: Sequence[float] | None,
    shares: Sequence[float],
    prices: Sequence[float] | None,
) -> list[Pace | None]:
    """Return the speed that each GPU is taken to have; none of them has one without ratings.

    Raises UserError for prices without ratings, for numbers of neither one nor as many values as
    there are GPUs, and for a share above 1.
    """
    if max(shares) > 1:
        raise UserError(f"--share={max(shares):g}: no GPU does more than it is rated for")
    if tflops is None:
        if prices is not None:
            raise UserError("--price wants --tflops, the GPU's rating, from which hours follow")
        return [None] * len(gpus)
    ratings = _one_each("--tflops", tflops, len(gpus))
    costs = [None] * len(gpus) if prices is None else _one_each("--price", prices, len(gpus))
    return [Pace(rating, tuple(shares), cost) for rating, cost in zip(ratings, costs, strict=True)]


def _one_each(flag: str, values: Sequence[float], count: int) -> Sequence[float]:
    """Return a value for each GPU: those that are given, or the only one for all."""
    if len(values) not in (1, count):
        raise UserError(f"{flag} has {len(values)} values for {count} of --gpu; give one, or each")
    return [values[0]] * count if len(values) == 1 else values


def report(cfg: DictConfig, gpus: Sequence[float], speeds: Sequence[Pace | None]) -> None:
    """Print the tables, and for each GPU the choice that should be fastest, with the hours that the
    run would take where the GPU's speed is given.
    """
    plan = Plan(cfg)
    num_frames, *sides = plan.picture
    clip = f"{num_frames} frames of " if num_frames > 1 else ""
    size = in_words(*sides)
    print(f"{cfg.model.pretrained}, {cfg.model.dtype}, {clip}{size} pixels; GiB per GPU")
    print_weights(plan, gpus)
    print("  passes are being counted", flush=True)
    room = room_of(max(gpus))
    tables: dict[bool, dict[int, Costs]] = {}
    for way in ways_of(plan):
        tables[way] = count_table(plan, way, room)
        print_table(plan, way, tables[way])
    print_work(plan, tables)
    for gpu, pace in zip(gpus, speeds, strict=True):
        choice = choose(plan, tables, gpu)
        print(verdict(plan, tables, gpu, choice))
        if choice is not None and pace is not None:
            print(f"  {duration(plan, choice, pace)}")


def print_weights(plan: Plan, gpus: Sequence[float]) -> None:
    """Print what is there all along, before training, and in the host's memory."""
    for name, value in plan.weights().items():
        if value:
            print_row(name, value)
    print_not_counted(plan)
    encoders = plan.text_encoders()
    if encoders is not None:
        note = "dropped; the networks above come after"
        too_small = [f"{gpu:g}" for gpu in gpus if encoders > room_of(gpu)]
        if too_small:
            note = f"more than fits {', '.join(too_small)} GiB: embed elsewhere"
        print_row("text encoders, before", encoders, note)
    print_row("host memory, states", plan.host())
    note = "a process" if encoders is not None else "a process, without text encoders"
    print_row("host memory, loading", plan.loading(), note)


def print_not_counted(plan: Plan) -> None:
    """Name what takes memory, too, and is in none of the numbers, or assumed."""
    for network in plan.scorers:
        if network.num_parameters is None:
            print(f"  not counted: {network.name}, of reward")
    if plan.method.loss.kind == "direct":
        print("  not counted: what the scorer keeps in updates, through which gradients go")
    if names := unnamed(plan.cfg):
        print(f"  taken to be as large as the LoRA that is trained: teachers {', '.join(names)}")


def print_row(name: str, num_bytes: int, note: str = "") -> None:
    """Print a name and its GiB, and what there is to say of it."""
    remark = f"  ({note})" if note else ""
    print(f"  {name:<24}{num_bytes / GIB:>9.2f}{remark}")


def ways_of(plan: Plan) -> list[bool]:
    """Return whether updates may recompute blocks: as configured first, and otherwise, where the
    network can.
    """
    ways = [plan.is_checkpointed]
    if plan.can_checkpoint:
        ways.append(not plan.is_checkpointed)
    return ways


def count_table(plan: Plan, is_checkpointed: bool, room: float) -> dict[int, Costs]:
    """Count the costs of all micro-batches up to the first that does not fit, by their rows."""
    one = plan.costs(1, is_checkpointed)
    two = plan.costs(2, is_checkpointed)
    table = {}
    for rows in plan.micro_batches():
        table[rows] = plan.extrapolated(rows, one, two)
        if table[rows].peak > room:
            break
    return table


def print_table(plan: Plan, is_checkpointed: bool, table: Mapping[int, Costs]) -> None:
    """Print the costs of micro-batches, by their rows."""
    if plan.can_checkpoint:
        note = " (as configured)" if is_checkpointed == plan.is_checkpointed else ""
        print(f"{CHECKPOINTING}={in_yaml(is_checkpointed)}{note}")
    print(f"{'micro-batch':>12}" + "".join(f"{name:>{len(name) + 3}}" for name in COLUMNS))
    for rows, costs in table.items():
        values = zip(COLUMNS, (*astuple(costs), costs.peak), strict=True)
        cells = [f"{value / GIB:>{len(name) + 3}.2f}" for name, value in values]
        print(f"{rows:>12}" + "".join(cells))


def print_work(plan: Plan, tables: Tables) -> None:
    """Print the operations behind one image, and what checkpointing changes."""
    print("operations of an image, 10^12: ", end="")
    plain = plan.work(False)
    shares = {"rollout": plain.rollout, "decode": plain.decode, "update": plain.update}
    if plain.scouting:
        shares["scouting"] = plain.scouting
    print(", ".join(f"{name} {value / TERA:.3g}" for name, value in shares.items()))
    if plan.can_checkpoint:
        recomputed = plan.work(True)
        peaks = [f"{tables[way][1].peak / GIB:.2f}" for way in (True, False)]
        print(
            f"checkpointing: {recomputed.total / plain.total:.2g}x the operations of an iteration "
            f"(update {recomputed.update / TERA:.3g}; predicted), and at the peak {peaks[0]} GiB "
            f"instead of {peaks[1]} with one image"
        )


def choose(plan: Plan, tables: Tables, gpu: float) -> Choice | None:
    """Choose what should be fastest on a GPU; None where nothing fits."""
    num_enough = enough(plan.num_tokens)
    return fastest(tables, room_of(gpu), plan.micro_batches()[-1], num_enough)


def duration(plan: Plan, choice: Choice, pace: Pace) -> str:
    """Say the hours that the run would take, and what they cost."""
    of_an_image = plan.work(choice.is_checkpointed).total
    hours = pace.hours(of_an_image * plan.samples * plan.cfg.num_iterations)
    shares = " to ".join(f"{share:g}" for share in sorted(pace.shares))
    words = f"predicted, at {shares} of {pace.tflops:g} TFLOP/s: {plan.cfg.num_iterations} "
    words += f"iterations in {between(hours)} hours"
    if pace.price is None:
        return words
    cost = between([hour * pace.price * plan.plan.num_processes for hour in hours])
    return f"{words}, which cost {cost} at {pace.price:g} an hour and GPU"


def between(values: Sequence[float]) -> str:
    """Write a range of numbers to two digits, or to the whole one above a hundred."""
    words = [f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in values]
    return " to ".join(dict.fromkeys(words))


def verdict(plan: Plan, tables: Tables, gpu: float, choice: Choice | None) -> str:
    """Say what to set for a GPU, or what may be changed where nothing fits."""
    if choice is None:
        least = min((table[1] for table in tables.values()), key=lambda costs: costs.peak)
        return f"nothing fits {gpu:g} GiB with {SPARE:.0%} kept free; change {plan.remedies(least)}"
    words = [f"batch.max_micro_batch={choice.max_micro_batch}"]
    if plan.can_checkpoint:
        words.append(f"{CHECKPOINTING}={in_yaml(choice.is_checkpointed)}")
    return f"within {gpu:g} GiB, {SPARE:.0%} kept free: {' '.join(words)}"


def in_yaml(value: bool) -> str:
    """Write a truth value as the command line has it."""
    return str(value).lower()


def main() -> None:
    """Read the command line, check it, and report."""
    args = arguments.plan().parse_intermixed_args()
    # its warning about casts concerns weights, of which there are none
    diffusers.utils.logging.set_verbosity_error()
    speeds = paces(args.gpu, args.tflops, args.share, args.price)
    cfg = compose(["name=plan", *with_config_dir(args.overrides, args.config_dir)])
    validate(named(cfg))
    report(cfg, args.gpu, speeds)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
