"""Train the learned reward of the shapes world: python scripts/train_proxy.py --out
flowrl/rewards/assets

A contrastive open_clip model of 32x32 scenes and their captions, from fixed seeds. It sees few
scenes, all of them drawn by the renderer, so that it is right about them and easily misled by
anything else: a proxy, not a judge. The shipped weak one: --out flowrl/rewards/assets/weak --scenes
64 --steps 300.
"""

from flowrl.launch.program import run_program

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shapes_pipeline import draw_scenes
from torch import Tensor
from torch.nn.functional import cross_entropy

from flowrl.rewards.shapes_proxy import CONFIG, END, WEIGHTS, build, normalised, tokenize
from flowrl.runs.files import grant_usual_mode

ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 4,
        "width": 64,
        "layers": 3,
        "head_width": 32,
        "mlp_ratio": 2.0,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": END + 1,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 2.0,
    },
}
Model = Any
"""A model of open_clip, whose methods are not those of a plain module."""

BATCH = 128
RATE = 1e-3
DECAY = 0.05
TESTED = 512


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for configuration and weights"
    )
    parser.add_argument(
        "--scenes",
        type=int,
        default=6000,
        help="to learn from; with few of them it is easily misled",
    )
    parser.add_argument("--steps", type=int, default=1000, help="about four minutes of one core")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def scenes(count: int, seed: str) -> tuple[Tensor, Tensor]:
    """Draw images in [-1, 1] and the tokens of their captions."""
    captions, images = draw_scenes(count, random.Random(seed))
    rounded = normalised(((images / 2 + 0.5) * 255).round() / 255)  # as the reward sees them
    texts = [caption.text for caption in captions]
    return rounded, tokenize(texts, ARCHITECTURE["text_cfg"]["context_length"])


def logits(model: Model, images: Tensor, tokens: Tensor) -> Tensor:
    """Compare each image with each text, (images, texts), as CLIP does."""
    image_features = model.encode_image(images, normalize=True)
    return model.logit_scale.exp() * (image_features @ model.encode_text(tokens, normalize=True).T)


def targets(tokens: Tensor) -> Tensor:
    """Share each image among all captions of the batch that are equal to its own."""
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    return same / same.sum(1, keepdim=True)


@torch.no_grad()
def accuracy(model: Model) -> float:
    """Return the share of unseen scenes that score highest with their own caption, of 16 scenes'
    captions.
    """
    images, tokens = scenes(TESTED, "proxy test")
    hits = []
    for some_images, their_tokens in zip(images.split(16), tokens.split(16), strict=True):
        best = logits(model.eval(), some_images, their_tokens).argmax(1)
        hits.append((their_tokens[best] == their_tokens).all(-1).float())
    return float(torch.cat(hits).mean())


def train(steps: int, seed: int, num_scenes: int) -> Model:
    """Train a model from its seed, and print its loss now and then."""
    torch.manual_seed(seed)
    model: Model = build(ARCHITECTURE).train()
    images, tokens = scenes(num_scenes, f"proxy {seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    start = time.monotonic()
    for step in range(steps):
        rows = torch.randint(len(images), (BATCH,))
        scores = logits(model, images[rows], tokens[rows])
        wanted = targets(tokens[rows])
        loss = (cross_entropy(scores, wanted) + cross_entropy(scores.T, wanted)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6)  # 100, as in CLIP
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}: loss {loss:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    return model


def main() -> None:
    """Train, write configuration and weights, and print how good they are."""
    args = arguments()
    model = train(args.steps, args.seed, args.scenes)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / CONFIG).write_text(json.dumps(ARCHITECTURE, indent=2) + "\n")
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, args.out / WEIGHTS)
    grant_usual_mode(args.out / WEIGHTS)
    size = (args.out / WEIGHTS).stat().st_size / 2**20
    print(f"{args.out / WEIGHTS}: {size:.2f} MiB, right caption of 16: {accuracy(model):.1%}")


if __name__ == "__main__":
    sys.exit(run_program(main, computes=True))
