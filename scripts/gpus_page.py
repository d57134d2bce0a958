"""Write which GPU takes which recipe, and what that should take of time and money, into
`docs/how-to/gpus.md`.

    python scripts/gpus_page.py                        # all rows, some minutes each
    python scripts/gpus_page.py flow_grpo_z_image      # these rows, and the others as they are

Everything is what `scripts/plan_memory.py` predicts without weights or a GPU, for the command line
that stands in the row.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers

from flowrl.cli import plan as planner
from flowrl.cli.arguments import ASSUMED_SHARES
from flowrl.cli.memory_plan import Plan
from flowrl.cli.plan_costs import Choice, Pace
from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.speed.gpus import GPUS
from flowrl.values.units import GIB

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "gpus.md"
PETA = 10**15


@dataclass(frozen=True)
class Offer:
    """A GPU of `flowrl.speed.gpus`, by its name there, of so many GiB, and an assumed price in
    euros an hour.
    """

    name: str
    gib: int
    price: float

    @property
    def pace(self) -> Pace:
        """Return the speed that it is taken to have, a share of its rating in bfloat16."""
        [rating] = [gpu.bfloat16 for gpu in GPUS if gpu.name == self.name]
        assert rating is not None
        return Pace(rating, ASSUMED_SHARES, self.price)


OFFERS = (
    Offer("RTX 4070 Ti", 12, 0.15),
    Offer("RTX 4080", 16, 0.25),
    Offer("RTX 4090", 24, 0.40),
    Offer("A100", 40, 1.20),
    Offer("H100 SXM", 80, 2.50),
)
NF4 = "model.quantization=nf4"
ROWS = (
    "flow_dppo_sd35",
    "flow_grpo_sd35",
    "diffusion_nft_sd35",
    "draft_sd35",
    "diffusion_opd_sd35",
    "sol_rl_sd35_large",
    "diffusion_nft_sana15",
    "flow_grpo_z_image",
    "flow_grpo_z_image_24gb",
    "flow_dppo_flux1",
    f"flow_dppo_flux1 {NF4}",
    "flow_dppo_flux1_24gb",
    "flow_grpo_flux2",
    f"flow_grpo_flux2 {NF4}",
    "flow_dppo_flux2",
    "flow_dppo_flux2_24gb",
    "flow_dppo_qwen_image",
    "flow_dppo_qwen_image_24gb",
)
"""Recipes, and what is overridden."""
PARTS = ("fits", "takes")
"""The page's tables, whose rows stand between `<!-- begin PART -->` and `<!-- end PART -->`."""


def lines_of(row: str) -> tuple[str, str]:
    """Return the lines of a recipe in both tables."""
    name, *overrides = shlex.split(row)
    plan = Plan(compose(["name=plan", f"experiment={name}", *overrides]))
    room = planner.room_of(max(offer.gib for offer in OFFERS))
    tables = {way: planner.count_table(plan, way, room) for way in planner.ways_of(plan)}
    choices = [planner.choose(plan, tables, offer.gib) for offer in OFFERS]
    fits = [_fit(choice, tables) for choice in choices]
    takes = [_take(plan, choice, offer.pace) for choice, offer in zip(choices, OFFERS, strict=True)]
    work = plan.work(plan.is_checkpointed).total * plan.samples / PETA
    head = f"| `{row}` |"
    return (
        f"{head} {' | '.join(fits)} |",
        f"{head} {plan.cfg.num_iterations:,} x {_three_digits(work)} | {' | '.join(takes)} |",
    )


def _fit(choice: Choice | None, tables: planner.Tables) -> str:
    """Say a micro-batch, whether its blocks are recomputed, and the peak."""
    if choice is None:
        return "-"
    rows = choice.max_micro_batch
    peak = tables[choice.is_checkpointed][rows].peak / GIB
    return f"{rows}{' r' if choice.is_checkpointed else ''} ({peak:.1f})"


def _three_digits(value: float) -> str:
    """Write a number to three digits, in full."""
    return f"{float(f'{value:.3g}'):,g}"


def _take(plan: Plan, choice: Choice | None, pace: Pace) -> str:
    """Say the hours of a run, and its price in euros."""
    if choice is None:
        return "-"
    assert pace.price is not None
    operations = plan.work(choice.is_checkpointed).total * plan.samples * plan.cfg.num_iterations
    hours = pace.hours(operations)
    prices = planner.between([hour * pace.price * plan.plan.num_processes for hour in hours])
    return f"{planner.between(hours)} h, {prices} €"


def offers() -> str:
    """Return the lines of the table of GPUs, with what is taken of each."""
    cells = [
        (offer.name, f"{offer.gib} GiB", f"{offer.pace.tflops:g}", f"{offer.price:.2f}")
        for offer in OFFERS
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def replaced(text: str, part: str, body: str) -> str:
    """Return the page with other lines in one part."""
    head, rest = text.split(f"<!-- begin {part} -->\n", 1)
    _, tail = rest.split(f"<!-- end {part} -->", 1)
    return f"{head}<!-- begin {part} -->\n{body}<!-- end {part} -->{tail}"


def inserted(text: str, row: str, lines: Sequence[str]) -> str:
    """Return the page with the lines of a row in both tables, in the order of ROWS; lines of a row
    that is not among these are dropped.
    """
    cells = [f"`{name}`" for name in ROWS]
    for part, line in zip(PARTS, lines, strict=True):
        body = text.split(f"<!-- begin {part} -->\n", 1)[1].split(f"<!-- end {part} -->", 1)[0]
        rows = {old.split("|")[1].strip(): old for old in body.splitlines()}
        rows[f"`{row}`"] = line
        text = replaced(text, part, "".join(f"{rows[cell]}\n" for cell in cells if cell in rows))
    return text


def main() -> None:
    """Write the rows that the command line names, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="rows by their first cell; all where none is given")
    args = parser.parse_args()
    unknown = [row for row in args.rows if row not in ROWS]
    if unknown:
        raise UserError(f"{unknown[0]}: no row of the page; rows are {', '.join(ROWS)}")
    diffusers.utils.logging.set_verbosity_error()
    PAGE.write_text(replaced(PAGE.read_text("utf-8"), "gpus", offers()), "utf-8")
    for row in args.rows or ROWS:
        lines = lines_of(row)
        print("\n".join(lines), flush=True)
        # Read and written for each, since a row takes minutes.
        PAGE.write_text(inserted(PAGE.read_text("utf-8"), row, lines), "utf-8")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
