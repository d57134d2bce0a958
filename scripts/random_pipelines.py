"""Pipelines with random weights, in diffusers layout: the real classes of each family, for tests,
for timing, and for trying a family whose weights one does not have.

    python scripts/random_pipelines.py wan21                      # into random_pipelines/wan21
    python scripts/random_pipelines.py all pipelines              # every family, each in its folder
    python scripts/random_pipelines.py model=sd35_medium weights  # as large as released

A small pipeline has two to four blocks of 32 features; a tiny text encoder is as wide as the
transformer wants and as shallow as the pipeline allows. Each line that is printed names a folder,
its pipeline, and what its stock call takes for a small picture or clip.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from families.family import Family, save
from families.released import ADAPTERS

from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.models.architectures import ARCHITECTURES, AUTOENCODER

PLACE = Path("random_pipelines")
"""Where small pipelines go that are given no folder."""


def write_released(model: str, folder: Path) -> None:
    """Write the pipeline of a released size, given as `model=NAME`, in bfloat16."""
    cfg: Any = compose(["name=random", model]).model
    if cfg["_target_"] not in ADAPTERS or cfg.pretrained not in ARCHITECTURES:
        raise UserError(
            f"{model}: no pipeline of that size is made of {cfg.pretrained}; give a family, which "
            "is made small"
        )
    torch.manual_seed(0)
    _, transformer = ARCHITECTURES[cfg.pretrained]
    torch.set_default_dtype(torch.bfloat16)
    save(ADAPTERS[cfg["_target_"]](transformer, AUTOENCODER), folder, torch.bfloat16)
    print(f"{folder}: {cfg.pretrained} with random weights")


def write_small(name: str, folder: Path) -> None:
    """Write the small pipeline of a family."""
    family = FAMILIES[name]
    pipeline = family.make()
    save(pipeline, folder, torch.float32)
    print(
        f"{folder}: {type(pipeline).__name__} with random weights, called with {described(family)}"
    )


def described(family: Family) -> str:
    """Return what a family's stock call takes, and what keeps it from being trained."""
    call = json.dumps(dict(family.call))
    if family.picture:
        call += " and a picture"
    return f"{call}; not to be trained: {family.obstacle}" if family.obstacle else call


def main() -> None:
    """Write the pipelines that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Families: {', '.join(FAMILIES)}.",
    )
    parser.add_argument("what", help="a family, all of them, or model=NAME, one of conf/model")
    parser.add_argument("folder", type=Path, nargs="?", help="by default below random_pipelines")
    args = parser.parse_args()
    if args.what.startswith("model="):
        write_released(args.what, args.folder or PLACE / args.what.removeprefix("model="))
    elif args.what == "all":
        for name in FAMILIES:
            write_small(name, (args.folder or PLACE) / name)
    elif args.what in FAMILIES:
        write_small(args.what, args.folder or PLACE / args.what)
    else:
        known = ", ".join(FAMILIES)
        raise UserError(f"{args.what}: no such family; known are {known}, and all")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
