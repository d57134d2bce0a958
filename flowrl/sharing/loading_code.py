"""The lines of Python that load published weights into stock diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flowrl.runs.description import EMBEDDED, base_model_of
from flowrl.sharing.drawn import is_moving
from flowrl.values.sizes import known_size

PROMPT = "a photo of a red bicycle"
PROMPT_OF_SHAPES = "a red circle above a blue square"


def loading_code(
    config: Mapping[str, Any],
    repository: str,
    transformer: str,
    revision: str | None = None,
    *,
    companions: Mapping[str, str] = MappingProxyType({}),
    num_frames: int | None = None,
) -> str:
    """Return a program that draws an image or a clip with the weights of a repository, on the base
    model of the configuration; `transformer` is the class of a whole one, empty for a LoRA, and
    `companions` are the names of its files of further networks, by network. Without a `revision`
    the weights are those of the main branch. `num_frames` are those of a clip, None where the
    pipeline draws pictures: `flowrl.sharing.drawn` tells.
    """
    base = base_model_of(config)
    is_embedded = base.startswith(EMBEDDED)
    kind = "StableDiffusion3Pipeline" if is_embedded else "DiffusionPipeline"
    source = f'resolve("{base}")' if is_embedded else f'"{base}"'
    dtype = f"dtype=torch.{_model(config).get('dtype', 'bfloat16')}"
    arguments = [source, dtype, *_arguments(config)]
    weights = [f'"{repository}"', *_revision(revision)]
    lines = ["import torch"]
    lines.append(f"from diffusers import {', '.join(filter(None, (kind, transformer)))}")
    is_clip = is_moving(num_frames)
    if is_clip:
        lines.append("from diffusers.utils import export_to_video")
    if is_embedded:
        lines.append("from flowrl.models.loading import resolve")
    lines.append("")
    if transformer:
        place = ", ".join([*weights, 'subfolder="transformer"', dtype])
        lines.append(f"transformer = {transformer}.from_pretrained({place})")
        arguments.append("transformer=transformer")
    lines.append(f"pipe = {kind}.from_pretrained(")
    lines += [f"    {argument}," for argument in arguments]
    lines.append(")")
    if not is_embedded:
        lines.append('pipe.to("cuda")')
    if not transformer:
        lines.append(f"pipe.load_lora_weights({', '.join(weights)})")
    for network, name in companions.items():
        lines.append("pipe.load_lora_weights(")
        lines += [f"    {argument}," for argument in (*weights, f'weight_name="{name}"')]
        lines += [f"    load_into_{network}=True,", ")"]
    prompt = PROMPT_OF_SHAPES if is_embedded else PROMPT
    lines.append("frames = pipe(" if is_clip else "image = pipe(")
    lines += [f"    {argument}," for argument in (f'"{prompt}"', *_drawing(config))]
    lines += _saving(num_frames)
    return "\n".join(lines)


def _saving(num_frames: int | None) -> list[str]:
    """Return the lines that end the call, take the first result and save it."""
    if num_frames is None:
        return [").images[0]", 'image.save("image.png")']
    if is_moving(num_frames):
        return [").frames[0]", 'export_to_video(frames, "clip.mp4")']
    # Pipelines of clips return arrays unless asked for pictures.
    return ['    output_type="pil",', ").frames[0][0]", 'image.save("image.png")']


def _model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("model") or {}


def _arguments(config: Mapping[str, Any]) -> list[str]:
    """Return what the base model is loaded with: its revision, no T5 where there is no text for it,
    and no component that was left out.
    """
    model = _model(config)
    arguments = _revision(model.get("revision"))
    if model.get("max_sequence_length") == 0:
        arguments += ["text_encoder_3=None", "tokenizer_3=None"]
    return arguments + [f"{name}=None" for name in model.get("without") or ()]


def _revision(revision: str | None) -> list[str]:
    """Return the argument that names a revision; none for the main branch."""
    return [f"revision={json.dumps(revision)}"] if revision else []


def _drawing(config: Mapping[str, Any]) -> list[str]:
    """Return the arguments that images of the evaluation were drawn with."""
    evaluation = config.get("evaluation") or {}
    model = _model(config)
    height, width = known_size(config) or (None, None)
    values = {
        "num_inference_steps": evaluation.get("num_steps"),
        model.get("guidance") or "guidance_scale": evaluation.get("guidance_scale"),
        "height": height,
        "width": width,
        "max_sequence_length": model.get("max_sequence_length"),
        **(model.get("call") or {}),
    }
    return [f"{key}={value!r}" for key, value in values.items() if value is not None]
