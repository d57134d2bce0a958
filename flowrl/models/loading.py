"""Loading a diffusers pipeline, with errors that name the path and the remedy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

EMBEDDED = "embedded:"
"""Prefix of `model.pretrained` for a pipeline shipped inside the package."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve(pretrained: str) -> str:
    """A local folder or hub id; raises ValueError where a local path is meant and missing."""
    if pretrained.startswith(EMBEDDED):
        return str(files("flowrl.shapes").joinpath("assets", pretrained.removeprefix(EMBEDDED)))
    path = Path(pretrained).expanduser()
    looks_local = path.is_absolute() or pretrained.startswith((".", "~")) or pretrained.count("/") != 1
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"model.pretrained={pretrained}: no model_index.json; give a folder in diffusers layout")
        return str(path)
    if looks_local:
        raise ValueError(f"model.pretrained={pretrained}: no such folder; give a diffusers folder or a hub id ORG/NAME")
    return pretrained


def load_pipeline(
    kind: type[Any], pretrained: str, *, revision: str | None, dtype: str, left_out: Sequence[str] = ()
) -> Any:
    """`kind.from_pretrained`, a pipeline class of diffusers, in one dtype, without the components `left_out`.

    Raises ValueError, in one line, for missing or unreadable weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    source = resolve(pretrained)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipeline = kind.from_pretrained(
            source, revision=revision, dtype=DTYPES[dtype], use_safetensors=True, **dict.fromkeys(left_out)
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model.pretrained={pretrained}: cannot load {kind.__name__} ({_culprit(source) or reason}); "
            "restore the folder or download it again"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _culprit(source: str) -> str | None:
    """The first weights file of a local folder that safetensors cannot open."""
    from safetensors import safe_open

    if not os.path.isdir(source):
        return None
    for path in sorted(Path(source).rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"corrupt weights file {path}: {error}"
    return None
