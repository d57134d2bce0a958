"""Convert a LoRA between the formats of diffusers, peft and ComfyUI.

    python scripts/export_lora.py outputs/latest --format comfy
    python scripts/export_lora.py outputs/latest --format peft model=sd35_medium
    python scripts/export_lora.py style.safetensors --format diffusers --out style

What is converted is a run's folder, its lora/ folder, or any LoRA file; the result is written
beside it, or into --out. Of a run that has not finished its newest checkpoint's EMA is taken. With
`model=NAME` the file's layers are checked against that model's transformer, of which no weights are
needed.

The result says in its metadata what the LoRA was trained on and how, as far as the file does; for
ComfyUI by the keys of ModelSpec.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

from dataclasses import replace
from pathlib import Path

from flowrl.cli import arguments
from flowrl.launch.compose import compose
from flowrl.launch.search_path import with_config_dir
from flowrl.models.outline import outline
from flowrl.runs.base_model import named_here
from flowrl.runs.description import base_model_of
from flowrl.tuning import formats
from flowrl.tuning.metadata import BASE, day_of
from flowrl.tuning.writer import write


def beside(source: Path, file: Path) -> Path:
    """Return where the result goes by default: into the run's folder, or else next to the folder of
    the LoRA file.
    """
    if source.is_dir() and file.parent != source:
        return source
    return file.parent.parent


def main() -> None:
    """Read the command line, convert, and say what was written where."""
    args = arguments.export().parse_intermixed_args()
    overrides = with_config_dir(args.overrides, args.config_dir)
    file = formats.find(args.source)
    if file.name == formats.AVERAGE:
        print(f"{args.source} has not finished: its checkpoint {file.parent.name} is exported")
    lora_file = formats.read(file)
    if overrides:
        model = compose(["name=export", *overrides]).model
        transformer = outline(model)
        if transformer is not None:
            formats.check(lora_file, transformer, file)
        base = {BASE: base_model_of(named_here({"model": model}))}
        # What the file itself says comes first.
        lora_file = replace(lora_file, notes={**base, **lora_file.notes})
    folder = args.out or beside(args.source, file) / f"lora_{args.format}"
    print(f"{write(lora_file, folder, args.format, day_of(file))}: {lora_file.describe()}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
