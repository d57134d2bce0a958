"""Draw prompts with a base model and a LoRA, or a fully trained transformer, side by side, from the
same noise.

    python scripts/generate.py model=shapes --prompt "a red circle" --lora outputs/latest --count 4
    python scripts/generate.py model=sd35_medium --prompts prompts.txt --lora style.safetensors
    python scripts/generate.py model=shapes --prompt "a star" --transformer fully_tuned/transformer

Steps, guidance, grid and seed are the evaluation's (`evaluation.num_steps=28` changes them). Every
image is written as a PNG that carries its prompt, model, LoRA, seed and number, and moves where it
is a clip; grid.png shows all, base beside trained.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.evaluation.drawing import draw_prompt
from flowrl.images.contact_sheet import INK, PAPER, enlarged, save_sample, strip, to_pil
from flowrl.images.pictures import read_upright
from flowrl.launch.checks import check_guidance
from flowrl.launch.compose import compose
from flowrl.launch.pictured import check_model_of_prompts
from flowrl.launch.search_path import with_config_dir
from flowrl.launch.validate import validate
from flowrl.models.outline import outline
from flowrl.models.text import device
from flowrl.prompts.files import file_prompts
from flowrl.prompts.lines import checked_text
from flowrl.tuning import formats, full, lora
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.protocol import Tuning
from flowrl.types import Prompt
from flowrl.values.plural import counted

MARGIN = 8
LINE = 16


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


def read(args: argparse.Namespace, model: DictConfig) -> LoRAFile | None:
    """Read the LoRA that was asked for, if any, and compare it with the base's architecture before
    weights load.
    """
    if args.lora is None:
        return None
    lora_file = formats.read(args.lora)
    transformer = outline(model)
    if transformer is not None:
        formats.check(lora_file, transformer, args.lora)
    print(f"{args.lora}: {lora_file.describe()}")
    return lora_file


def attach(
    args: argparse.Namespace, lora_file: LoRAFile | None, transformer: Any
) -> dict[str, Tuning]:
    """Attach the LoRA or take the whole transformer that was asked for, if any, under its name."""
    if lora_file is not None:
        return {"lora": lora.attach_file(lora_file, transformer, args.lora)}
    if args.transformer is not None:
        return {"transformer": full.attach_whole(transformer, args.transformer)}
    return {}


def save(image: Tensor, path: Path, facts: Mapping[str, object]) -> None:
    """Write an image or a clip as a PNG that carries facts about it."""
    notes = PngInfo()
    for key, value in facts.items():
        notes.add_text(key, str(value))
    save_sample(image, path, pnginfo=notes)


def generate(cfg: DictConfig, args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Draw all prompts with the base model and what was trained, and write the images and their
    sheet.
    """
    check_guidance(cfg)
    check_model_of_prompts(cfg, prompts)
    lora_file = read(args, cfg.model)
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
                images = draw_prompt(
                    model,
                    embed,
                    evaluator,
                    prompt,
                    number=i,
                    count=args.count,
                    seed=evaluator.seed,
                )
                drawn[i, name] = images.cpu()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, prompt in enumerate(prompts):
        titled: list[tuple[str, Image.Image]] = []
        for j, name in product(range(args.count), variants):
            image = drawn[i, name][j]
            titled.append((f"{name} {j}", strip(image) if image.ndim == 4 else to_pil(image)))
            facts = {
                "prompt": prompt.text,
                "model": cfg.model.pretrained,
                "seed": evaluator.seed,
                "number": j,
            }
            if name != "base":
                facts[name] = getattr(args, name)
            save(image, args.out / f"{i:03d}-{j}-{name}.png", facts)
        if prompt.image is not None:
            source = read_upright(Path(prompt.image.path))
            size = titled[0][1].size
            titled.insert(0, ("source", ImageOps.pad(source, size, color=PAPER)))
        rows.append((prompt.text, titled))
    sheet(rows).save(args.out / "grid.png")
    num_images = len(prompts) * args.count * len(variants)
    print(f"{args.out}: {counted(num_images, 'image')}, grid.png")


def main() -> None:
    """Read the command line, check it, and draw."""
    args = arguments.generate().parse_intermixed_args()
    prompts = [Prompt(checked_text(text, "--prompt")) for text in args.prompt]
    prompts += file_prompts(args.prompts) if args.prompts else []
    if not prompts:
        raise UserError("--prompt or --prompts: nothing to draw; give at least one prompt")
    if args.count < 1:
        raise UserError(f"--count={args.count} must be at least 1")
    cfg = compose(["name=pictures", *with_config_dir(args.overrides, args.config_dir)])
    validate(cfg)
    generate(cfg, args, prompts)


if __name__ == "__main__":
    raise SystemExit(run_program(main, computes=True))
