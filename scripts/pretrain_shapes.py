"""Pretrain the embedded shapes pipeline: autoencoder, then transformer and text encoders, then
export.

    python scripts/pretrain_shapes.py --work outputs/pretrain          # about an hour on two cores

Stages run in order and resume where they stopped (`--work` keeps checkpoints, a log and sample
grids): `autoencoder`; `clean` (flow matching on true captions to convergence); `corrupted` (the
same on captions of which some are replaced whole and others in single words, at fixed rates, which
makes the able but unreliable model that reinforcement learning starts from); `export` (a
StableDiffusion3Pipeline folder in diffusers layout, with its metrics).
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import copy
import json
import math
import random
import shutil
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from shapes_pipeline import (
    AUTOENCODER,
    Generator,
    Network,
    draw_scenes,
    evaluate,
    export,
    reconstruction_score,
)
from torch import Tensor, nn

from flowrl.runs.files import replacing
from flowrl.shapes.grammar import FAMILIES, Caption, corrupt, sample_caption

KL_WEIGHT = 1e-4
CORRUPTION = {"caption": 0.15, "colour": 0.05, "shape": 0.05, "count": 0.05, "relation": 0.05}
CAPTION_DROPOUT = 0.05
NUM_LATENTS = 80_000


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Return the rate of a step: a linear warm-up over 3 % of the steps, then a cosine to zero."""
    warm = max(1, int(0.03 * num_steps))
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps))))


class Log:
    """The metrics of the pretraining, printed and appended to `log.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.time()

    def write(self, **row: float | str) -> None:
        """Take a row, with the seconds since the start."""
        row["seconds"] = round(time.time() - self.start, 1)
        cells = []
        for key, value in row.items():
            cells.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
        print("  ".join(cells), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def save_checkpoint(path: Path, **state: object) -> None:
    """Write a checkpoint whole, so that an interrupted save leaves the previous one."""
    with replacing(path) as partial:
        torch.save(state, partial)


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of all parameters."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def train_autoencoder(
    work: Path, log: Log, num_steps: int, batch_size: int, peak: float
) -> Network:
    """Train stage 1: mean squared and absolute error plus a light KL, on fresh scenes."""
    torch.manual_seed(1)
    autoencoder: Network = AutoencoderKL(**AUTOENCODER)
    autoencoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0
    )
    path = work / "autoencoder.pt"
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        autoencoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
    for step in range(start, num_steps):
        set_rate([optimizer], learning_rate(step, num_steps, peak))
        _, images = draw_scenes(batch_size, random.Random(f"autoencoder {step}"))
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(images).latent_dist
        error = (
            autoencoder.decode(posterior.sample(torch.Generator().manual_seed(step))).sample
            - images
        )
        loss = error.square().mean() + 0.2 * error.abs().mean()
        loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == num_steps:
            strict = reconstruction_score(autoencoder, 512)
            log.write(
                stage="autoencoder", step=step + 1, loss=loss.item(), reconstruction_strict=strict
            )
            save_checkpoint(
                path,
                model=autoencoder.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
            )
    return autoencoder.eval()


@torch.no_grad()
def encode_latents(work: Path, autoencoder: Network) -> tuple[list[Caption], Tensor, float]:
    """Return captions and latents of NUM_LATENTS scenes, float16 and scaled to unit variance, and
    the scale used.
    """
    path = work / "latents.pt"
    captions = []
    means = []
    cached = torch.load(path, weights_only=True) if path.exists() else None
    for start in range(0, NUM_LATENTS, 2000):
        rng = random.Random(f"latents {start}")
        if cached is not None:
            captions += [sample_caption(rng.choice(FAMILIES), rng) for _ in range(2000)]
            continue
        chunk, images = draw_scenes(2000, rng)
        captions += chunk
        means += [autoencoder.encode(batch).latent_dist.mean for batch in images.split(250)]
    if cached is None:
        latents = torch.cat(means)
        scale = float(1 / latents.std())
        cached = {"latents": (latents * scale).half(), "scale": scale}
        torch.save(cached, path)
    return captions, cached["latents"], cached["scale"]


def make_optimizers(generator: Generator, peak: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    in_blocks = generator.transformer.transformer_blocks.parameters()
    matrices = [weight for weight in in_blocks if weight.ndim == 2]
    ids = {id(weight) for weight in matrices}
    others = [weight for weight in generator.parameters() if id(weight) not in ids]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)]


def draw_captions(
    captions: Sequence[Caption], batch_size: int, rates: dict[str, float] | None, rng: random.Random
) -> tuple[list[int], list[str], int]:
    """Draw the scenes of a batch, the texts that they are trained on, and the number of T5's zero
    tokens among those.

    A batch with such tokens is long, and therefore a quarter as large.
    """
    num_pads = int(256 ** rng.random()) if rng.random() < 0.06 else 0
    count = batch_size // 4 if num_pads else batch_size
    scenes = [rng.randrange(len(captions)) for _ in range(count)]
    views = [corrupt(captions[i], rates, rng) if rates else captions[i] for i in scenes]
    texts = ["" if rng.random() < CAPTION_DROPOUT else view.text for view in views]
    return scenes, texts, num_pads


def flow_matching_loss(
    generator: Generator, x_data: Tensor, texts: list[str], num_pads: int, noise: torch.Generator
) -> Tensor:
    """Compute `mean (velocity - (noise - data))^2` at sigmas whose logit is normal."""
    eps = torch.randn(x_data.shape, generator=noise)
    sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(len(x_data), generator=noise))
    x = torch.lerp(x_data, eps, sigma[:, None, None, None])
    tokens, pooled = generator.encode(texts, num_pads)
    return (generator.velocity(x, sigma, tokens, pooled) - (eps - x_data)).square().mean()


def update(generator: Generator, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor) -> None:
    """Take one step of all optimizers, its gradient clipped to a norm of 1."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def train_generator(
    work: Path,
    log: Log,
    stage: str,
    generator: Generator,
    data: tuple[list[Caption], Tensor],
    decode: Network,
    num_steps: int,
    batch_size: int,
    peak: float,
    rates: dict[str, float] | None,
) -> Generator:
    """Train stage 2 by flow matching, and return the averaged weights.

    With `rates`, every view of a scene gets a freshly corrupted caption. A few batches carry T5's
    zero tokens, so that the stock pipeline's default call works as well as the short sequences used
    in training.
    """
    captions, latents = data
    torch.manual_seed(2)
    average = copy.deepcopy(generator)
    optimizers = make_optimizers(generator, peak)
    path = work / f"{stage}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        generator.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = int(state["step"])
    for step in range(start, num_steps):
        rng = random.Random(f"{stage} {step}")
        noise = torch.Generator().manual_seed(step)
        set_rate(optimizers, learning_rate(step, num_steps, peak))
        scenes, texts, num_pads = draw_captions(captions, batch_size, rates, rng)
        loss = flow_matching_loss(generator, latents[scenes].float(), texts, num_pads, noise)
        update(generator, optimizers, loss)
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.parameters()), list(generator.parameters()), 1 - decay
            )
        if (step + 1) % 500 == 0 or step + 1 == num_steps:
            score = evaluate(average, decode, 350, work / f"{stage}.png")
            log.write(stage=stage, step=step + 1, loss=loss.item(), **score)
            save_checkpoint(
                path,
                model=generator.state_dict(),
                average=average.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                step=step + 1,
            )
    return average.eval()


def main() -> None:
    """Run all stages, then measure and export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/pretrain"), help="checkpoints, log and grids"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("flowrl/shapes/assets/pipeline"),
        help="the exported pipeline",
    )
    parser.add_argument("--autoencoder-steps", type=int, default=2000)
    parser.add_argument("--clean-steps", type=int, default=6000)
    parser.add_argument("--corrupted-steps", type=int, default=400)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    args.work.mkdir(parents=True, exist_ok=True)
    log = Log(args.work / "log.jsonl")
    autoencoder = train_autoencoder(
        args.work, log, args.autoencoder_steps, batch_size=32, peak=3e-3
    )
    captions, latents, scale = encode_latents(args.work, autoencoder)
    autoencoder.register_to_config(scaling_factor=scale, shift_factor=0.0)
    data = (captions, latents)
    torch.manual_seed(2)
    generator = Generator()
    train = partial(train_generator, args.work, log, data=data, decode=autoencoder, batch_size=256)
    clean = train("clean", generator, num_steps=args.clean_steps, peak=2e-3, rates=None)
    corrupted = train(
        "corrupted",
        copy.deepcopy(clean).train(),
        num_steps=args.corrupted_steps,
        peak=5e-4,
        rates=CORRUPTION,
    )
    export(args.out, corrupted, autoencoder)
    metrics = {
        "reconstruction_strict": reconstruction_score(autoencoder, 5000),
        "clean": evaluate(clean, autoencoder, 2100),
        "corrupted": evaluate(corrupted, autoencoder, 2100),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.copy(log.path, args.out / "pretraining.jsonl")


if __name__ == "__main__":
    raise SystemExit(run_program(main, computes=True))
