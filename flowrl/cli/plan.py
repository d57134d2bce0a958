"""Estimate a run's GPU memory per phase, and the largest micro-batch that fits: no weights, no GPU.

    python scripts/plan_memory.py model=sd35_medium --gpu 24
    python scripts/plan_memory.py experiment=flow_grpo_sd35 reward=pickscore --gpu 16,24,80
    python scripts/plan_memory.py model=flux2_klein_4b tuning=full --gpu 80
    python scripts/plan_memory.py experiment=flow_dppo_flux2 batch.num_processes=8 --gpu 80

Columns: `all along` and, on top of it, an evaluation or what an `iteration` holds of its samples;
on top of that the largest of rollout, decoding, update and optimizer step. The largest models take
minutes.

The networks are built on PyTorch's meta device and run there, forwards and backwards as a run
would; what each operation allocates and frees is counted, with attention as a fused kernel keeps
it. Kernels' own workspace is not counted, so a share of the GPU is kept free. Of scorers the
weights are counted, where their networks are known, and not their passes. trainer=ddp adds the
buckets of its reduction; trainer=fsdp divides weights, gradients and optimizer state over
`batch.num_processes` and makes blocks whole for a pass, of which an upper bound is counted.

A network that can recompute its blocks in updates has a table with that and one without, as
configured first. How much longer an iteration takes with it is predicted from the floating-point
operations of matrix products and convolutions alone, without the scorer's. For each GPU it
proposes what should be fastest of all that fits: without recomputing where at least 4 rows, or all
that there are, fit, or half as many as with it. No card has measured that rule. Either way nothing
changes but memory and speed.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

from collections.abc import Mapping, Sequence
from dataclasses import astuple

import diffusers
from omegaconf import DictConfig

from flowrl.cli import arguments
from flowrl.cli.memory_plan import Plan
from flowrl.cli.plan_costs import Costs, fastest
from flowrl.launch.compose import compose
from flowrl.launch.search_path import with_config_dir
from flowrl.launch.validate import validate
from flowrl.values.sizes import height_and_width, in_words

GIB = 2**30
TERA = 10**12
SPARE = 0.08
"""Share of the GPU left to the CUDA context, kernels' workspace and fragmentation."""

COLUMNS = ("all along", "iteration", "rollout", "decode", "update", "step", "evaluation", "peak")
CHECKPOINTING = "backend.gradient_checkpointing"

Tables = Mapping[bool, Mapping[int, Costs]]
"""The costs by rows, with gradient checkpointing and without."""


def room_of(gpu: float) -> float:
    """Return the bytes of a GPU of so many GiB that a run may take."""
    return gpu * (1 - SPARE) * GIB


def report(cfg: DictConfig, gpus: Sequence[float]) -> None:
    """Print the tables, and for each GPU the choice that should be fastest."""
    plan = Plan(cfg)
    size = in_words(*height_and_width(cfg.model.resolution))
    print(f"{cfg.model.pretrained}, {cfg.model.dtype}, {size} pixels; GiB per GPU")
    print_weights(plan, gpus)
    print("  passes are being counted", flush=True)
    ways = [plan.is_checkpointed]
    if plan.can_checkpoint:
        ways.append(not plan.is_checkpointed)
    room = room_of(max(gpus))
    tables = {way: print_table(plan, way, room) for way in ways}
    print_work(plan, tables)
    for gpu in gpus:
        print(verdict(plan, tables, gpu))


def print_weights(plan: Plan, gpus: Sequence[float]) -> None:
    """Print what is there all along, before training, and in the host's memory."""
    for name, value in plan.weights().items():
        if value:
            print_row(name, value)
    for network in plan.scorers:
        if network.num_parameters is None:
            print(f"  not counted: {network.name}, of reward")
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


def print_row(name: str, num_bytes: int, note: str = "") -> None:
    """Print a name and its GiB, and what there is to say of it."""
    remark = f"  ({note})" if note else ""
    print(f"  {name:<24}{num_bytes / GIB:>9.2f}{remark}")


def print_table(plan: Plan, is_checkpointed: bool, room: float) -> dict[int, Costs]:
    """Print the costs of all micro-batches up to the first that does not fit, and return them by
    their rows.
    """
    if plan.can_checkpoint:
        note = " (as configured)" if is_checkpointed == plan.is_checkpointed else ""
        print(f"{CHECKPOINTING}={in_yaml(is_checkpointed)}{note}")
    print(f"{'micro-batch':>12}" + "".join(f"{name:>{len(name) + 3}}" for name in COLUMNS))
    one = plan.costs(1, is_checkpointed)
    two = plan.costs(2, is_checkpointed)
    table = {}
    for rows in plan.micro_batches():
        costs = plan.extrapolated(rows, one, two)
        table[rows] = costs
        values = zip(COLUMNS, (*astuple(costs), costs.peak), strict=True)
        cells = [f"{value / GIB:>{len(name) + 3}.2f}" for name, value in values]
        print(f"{rows:>12}" + "".join(cells))
        if costs.peak > room:
            break
    return table


def print_work(plan: Plan, tables: Tables) -> None:
    """Print the operations behind one image, and what checkpointing changes."""
    print("operations of an image, 10^12: ", end="")
    plain = plan.work(False)
    shares = {"rollout": plain.rollout, "decode": plain.decode, "update": plain.update}
    print(", ".join(f"{name} {value / TERA:.3g}" for name, value in shares.items()))
    if plan.can_checkpoint:
        recomputed = plan.work(True)
        peaks = [f"{tables[way][1].peak / GIB:.2f}" for way in (True, False)]
        print(
            f"checkpointing: {recomputed.total / plain.total:.2g}x the operations of an iteration "
            f"(update {recomputed.update / TERA:.3g}; predicted), and at the peak {peaks[0]} GiB "
            f"instead of {peaks[1]} with one image"
        )


def verdict(plan: Plan, tables: Tables, gpu: float) -> str:
    """Say what to set for a GPU, or what may be changed where nothing fits."""
    choice = fastest(tables, room_of(gpu), plan.micro_batches()[-1])
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
    cfg = compose(["name=plan", *with_config_dir(args.overrides, args.config_dir)])
    validate(cfg)
    report(cfg, args.gpu)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
