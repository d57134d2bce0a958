"""Convert a LoRA between the formats of diffusers, peft and ComfyUI: python scripts/export_lora.py RUN --format comfy

RUN is a run's folder, its lora/ folder, or any LoRA file; the result is written beside it, or into --out. Of a run that
has not finished its newest checkpoint's EMA is taken. With `model=NAME` the file's layers are checked against that
model's transformer, of which no weights are needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import diffusers
import torch
import yaml

from flowrl.launch.compose import compose
from flowrl.launch.errors import one_line_errors
from flowrl.models import lora, lora_files
from flowrl.models.architectures import on_meta
from flowrl.models.loading import resolve
from flowrl.runs.checkpoint import list_complete
from flowrl.runs.files import CONFIG


def find(source: Path) -> tuple[Path, float | None]:
    """The file or folder to read, and the alpha of one that does not tell it."""
    if (source / lora.FOLDER).is_dir():
        return source / lora.FOLDER, None
    if not (source / lora.WHOLE_FOLDER).is_dir() and (saved := list_complete(source / "checkpoints")):
        print(f"{source} has not finished: its checkpoint {saved[-1].name} is exported")
        return saved[-1] / "ema.safetensors", float(yaml.safe_load((source / CONFIG).read_text())["lora"]["alpha"])
    return source, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("overrides", nargs="*", help="model=NAME, and configuration overrides as for train.py")
    parser.add_argument("--format", choices=get_args(lora_files.Format), required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    source, alpha = find(args.source)
    given = lora_files.read(source, alpha)
    if args.overrides:
        diffusers.utils.logging.set_verbosity_error()  # its warning about casts concerns weights, which are none here
        model = compose(["name=export", *args.overrides]).model
        lora_files.check(given, on_meta(resolve(model.pretrained), torch.bfloat16), source)
    place = args.source if source != args.source else (source if source.is_dir() else source.parent).parent
    folder = args.out or place / f"lora_{args.format}"
    print(f"{lora_files.write(given, folder, args.format)}: {len(given.a)} layers")


if __name__ == "__main__":
    raise SystemExit(one_line_errors(main))
