"""Draw prompts with a base model and a LoRA, or a fully trained transformer, side by side, from the
same noise.

    python scripts/generate.py model=shapes --prompt "a red circle" \
        --lora outputs/latest/lora --count 4
    python scripts/generate.py model=sd35_medium --prompts prompts.txt \
        --lora outputs/latest/lora --out pictures
    python scripts/generate.py model=shapes --prompt "a red circle" \
        --transformer outputs/latest/transformer

Steps, guidance, grid and seed are the evaluation's (`evaluation.num_steps=28` changes them). Every
image is written as a PNG that carries its prompt, model, LoRA, seed and number; grid.png shows all,
base beside trained.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from flowrl.cli.parser import make_parser
from flowrl.errors import UserError
from flowrl.evaluation.evaluator import Evaluator
from flowrl.images.contact_sheet import INK, PAPER, enlarged, to_pil
from flowrl.launch.checks import check_guidance
from flowrl.launch.compose import compose
from flowrl.launch.validate import validate
from flowrl.models import loading
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.protocol import FlowModel
from flowrl.models.text import device
from flowrl.noise import INITIAL, gaussian_noise
from flowrl.prompts.files import file_prompts
from flowrl.prompts.lines import checked_text
from flowrl.tuning import formats, full, lora
from flowrl.tuning.formats import LoRAFile
from flowrl.tuning.protocol import Tuning
from flowrl.types import Prompt
from flowrl.values.plural import counted

ITERATION = 2**32 - 2
"""The noise iteration of pictures, which neither training nor evaluation reaches."""

MARGIN = 8
LINE = 16


@torch.no_grad()
def draw(
    model: FlowModel,
    embed: PromptEmbeddings,
    evaluator: Evaluator,
    prompt: Prompt,
    number: int,
    count: int,
) -> Sequence[Image.Image]:
    """Draw `count` images of a prompt, which is the `number`-th; their noise depends on seed,
    number and place alone.
    """
    samples = [(number, i) for i in range(count)]
    x = gaussian_noise(
        model.latent_shape, seed=evaluator.seed, iteration=ITERATION, samples=samples, step=INITIAL
    )
    x = x.to(device())
    history = None
    conditioning = embed([prompt] * count)
    for interval in evaluator.intervals:
        velocity = model.velocity(x, interval.sigma, conditioning, evaluator.guidance_scale)
        x, history = evaluator.solver.advance(x, velocity, interval, history)
    return [to_pil(image) for image in model.decode(x)]


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> Image.Image:
    """Put one row a prompt on a sheet: its text, and its images with their titles.

    Small images are enlarged, their pixels as they are.
    """
    width, height = enlarged(rows[0][1][0][1]).size
    across = max(len(images) for _, images in rows) * (width + MARGIN) + MARGIN
    tall = height + 2 * LINE + MARGIN
    page = Image.new("RGB", (across, len(rows) * tall + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (text, images) in enumerate(rows):
        top = i * tall + MARGIN
        pen.text((MARGIN, top), text, INK)
        for j, (title, image) in enumerate(images):
            left = j * (width + MARGIN) + MARGIN
            page.paste(enlarged(image), (left, top + LINE))
            pen.text((left, top + LINE + height), title, INK)
    return page


def read(args: argparse.Namespace, pretrained: str) -> LoRAFile | None:
    """Read the LoRA that was asked for, if any, and compare it with the base's architecture before
    weights load.
    """
    if args.lora is None:
        return None
    lora_file = formats.read(args.lora)
    transformer = loading.transformer_on_meta(pretrained)
    if transformer is not None:
        formats.check(lora_file, transformer, args.lora)
    print(f"{args.lora}: {lora_file.describe()}")
    return lora_file


def attach(
    args: argparse.Namespace, lora_file: LoRAFile | None, transformer: Any
) -> dict[str, Tuning]:
    """Attach the LoRA or take the whole transformer that was asked for, if any, under its name."""
    if lora_file is not None:
        return {"lora": lora.attach(lora_file, transformer, args.lora)}
    if args.transformer is not None:
        return {"transformer": full.attach_whole(transformer, args.transformer)}
    return {}


def save(image: Image.Image, path: Path, facts: Mapping[str, object]) -> None:
    """Write an image as a PNG that carries facts about it."""
    notes = PngInfo()
    for key, value in facts.items():
        notes.add_text(key, str(value))
    image.save(path, pnginfo=notes)


def generate(cfg: DictConfig, args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Draw all prompts with the base model and what was trained, and write the images and their
    sheet.
    """
    check_guidance(cfg)
    lora_file = read(args, cfg.model.pretrained)
    evaluator = instantiate(cfg.evaluation)
    model: Any = instantiate(cfg.model)
    variants: dict[str, Any] = {"base": nullcontext()}
    for name, tuning in attach(args, lora_file, model.transformer).items():
        variants = {"base": tuning.at_reference(), name: nullcontext()}
    embed = instantiate(cfg.embeddings)(model, prompts)
    instantiate(cfg.backend).apply(model)
    model.to(device())
    embed.to(device())
    drawn = {}
    for name, state in variants.items():
        with state:
            for i, prompt in enumerate(prompts):
                drawn[i, name] = draw(model, embed, evaluator, prompt, i, args.count)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(prompts):
        images = []
        for j, name in product(range(args.count), variants):
            image = drawn[i, name][j]
            images.append((f"{name} {j}", image))
            facts = {
                "prompt": prompt.text,
                "model": cfg.model.pretrained,
                "seed": evaluator.seed,
                "number": j,
            }
            if name != "base":
                facts[name] = getattr(args, name)
            save(image, args.out / f"{i:03d}-{j}-{name}.png", facts)
        rows.append((prompt.text, images))
    sheet(rows).save(args.out / "grid.png")
    num_images = len(prompts) * args.count * len(variants)
    print(f"{args.out}: {counted(num_images, 'image')}, grid.png")


def main() -> None:
    """Read the command line, check it, and draw."""
    parser = make_parser("generate", __doc__)
    parser.add_argument(
        "overrides", nargs="*", help="model=NAME, and configuration overrides as for train.py"
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts", help="a file with one prompt, or one JSON object, a line")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument(
        "--lora", type=Path, help="a LoRA file, a folder with one, or a run's folder"
    )
    trained.add_argument("--transformer", type=Path, help="a folder that full fine-tuning exported")
    parser.add_argument("--count", type=int, default=1, help="images a prompt")
    parser.add_argument("--out", type=Path, default=Path("outputs/pictures"))
    args = parser.parse_intermixed_args()
    prompts = [Prompt(checked_text(text, "--prompt")) for text in args.prompt]
    prompts += file_prompts(args.prompts) if args.prompts else []
    if not prompts:
        raise UserError("--prompt or --prompts: nothing to draw; give at least one prompt")
    if args.count < 1:
        raise UserError(f"--count={args.count} must be at least 1")
    cfg = compose(["name=pictures", *args.overrides])
    validate(cfg)
    generate(cfg, args, prompts)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
