"""Measure what rounding alone gives of a step's KL: the floor below which no threshold of a mask
means anything.

    python scripts/measure_floor.py                          # the embedded model, both dtypes
    python scripts/measure_floor.py sampler=flow_sde         # any override of train.py
    python scripts/measure_floor.py --layers 3 12 24         # random pipelines of SD3's kind
    python scripts/measure_floor.py --moves 1e-6 1e-5 1e-4   # by how much every weight is moved
    python scripts/measure_floor.py --dtypes bfloat16 model=sd35_medium reward=jpeg_compressibility

A rollout is replayed with 1e-5 added to every trained weight, as at a run's start
(`trust/kl_floor/<step>`); the mean KL of each step that may be trained on is printed beside the
mask's threshold. float32 shows what the move itself does. Random weights stand for depth alone:
what a released model's floor is, only its weights tell.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from families.released import sd3
from random_pipelines import save

from flowrl.launch.build import build
from flowrl.launch.compose import compose
from flowrl.launch.quiet import quieten
from flowrl.training.floor import MOVE, measure_floor

WIDTH = 64
SMALL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
OF_RANDOM = (
    "model=sd35_medium",
    "model.resolution=64",
    "model.max_sequence_length=16",
    "grid.tokens=64",
    "lora.rank=4",
    "batch.prompts_per_iteration=2",
    "batch.group_size=8",
    "embeddings.folder=null",
    "backend.gradient_checkpointing=false",
)
"""A run on a small random pipeline, with SD3.5 Medium's grid, steps and threshold."""


def random_sd3(num_layers: int, folder: Path) -> Path:
    """Write a pipeline of SD3's kind with random weights: so many layers of width `WIDTH`, with 16
    latent channels and the normalised queries of SD3.5.
    """
    torch.manual_seed(0)
    transformer = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": num_layers,
        "num_attention_heads": 4,
        "attention_head_dim": WIDTH // 4,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    save(sd3(transformer, SMALL_VAE), folder, torch.float32)
    return folder


def show(name: str, overrides: Sequence[str], moves: Sequence[float]) -> None:
    """Print one row a move: the floor by step before the first update, and how much of the mask's
    threshold its largest is.
    """
    policy, data, _ = build(compose(["name=floor", *overrides]))
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    for frozen in (policy.model, policy.embed):
        frozen.to(policy.device)
    threshold = policy.objective.kl_threshold
    for move in moves:
        floor = measure_floor(policy, data.iterations[0], move)
        numbers = " ".join(f"{number}: {kl:.1e}" for number, kl in floor.items())
        share = ""
        if threshold:
            share = f"; largest / threshold {threshold:g}: {max(floor.values()) / threshold:.2g}"
        print(f"{name}, moved by {move:g}: {numbers}{share}", flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of train.py")
    parser.add_argument("--layers", nargs="+", type=int, help="of random pipelines of SD3's kind")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--moves", nargs="+", type=float, default=[MOVE], help="of every weight")
    args = parser.parse_intermixed_args()
    quieten()
    for dtype in args.dtypes:
        own = [*args.overrides, f"model.dtype={dtype}"]
        if not args.layers:
            show(f"as configured, {dtype}", own, args.moves)
        for num_layers in args.layers or ():
            with tempfile.TemporaryDirectory() as folder:
                pipeline = random_sd3(num_layers, Path(folder))
                words = [*OF_RANDOM, f"model.pretrained={pipeline}", *own]
                show(f"random SD3, {num_layers} layers, {dtype}", words, args.moves)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
