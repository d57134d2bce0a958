"""Convert a LoRA between the formats of diffusers, peft and ComfyUI: python scripts/export_lora.py RUN --format comfy

RUN is a run's folder, its lora/ folder, or any LoRA file; the result is written beside it, or into --out. With
`model=NAME` the file's layers are checked against that model's transformer, of which no weights are needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch
from hydra import compose, initialize_config_dir

from flowrl.command import one_line_errors, register_resolvers
from flowrl.models import lora, lora_files
from flowrl.models.architectures import on_meta
from flowrl.models.loading import resolve

CONF = Path(__file__).parents[1] / "conf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("overrides", nargs="*", help="model=NAME, and configuration overrides as for train.py")
    parser.add_argument("--format", choices=get_args(lora_files.Format), required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    source = args.source / lora.FOLDER if (args.source / lora.FOLDER).is_dir() else args.source
    given = lora_files.read(source)
    if args.overrides:
        register_resolvers()
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            model = compose("config", overrides=["name=export", *args.overrides]).model
        lora_files.check(given, on_meta(resolve(model.pretrained), torch.bfloat16), source)
    folder = args.out or (source if source.is_dir() else source.parent).with_name(f"lora_{args.format}")
    print(f"{lora_files.write(given, folder, args.format)}: {len(given.a)} layers")


if __name__ == "__main__":
    raise SystemExit(one_line_errors(main))
