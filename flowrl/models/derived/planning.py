"""A derived model without its weights, for plans: its pipeline on the meta device, and what its
texts would be encoded to, in shape.

Every prompt is taken to be as long as the pipeline lets it be, `model.call.max_sequence_length`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flowrl.errors import UserError
from flowrl.models.derived.arguments import use_of
from flowrl.models.derived.recording import Placed
from flowrl.models.experts import components_of
from flowrl.models.loading import META, Source, read_index, resolve
from flowrl.models.published import PUBLISHED
from flowrl.models.quantization import quantize
from flowrl.models.weights import DTYPES

Given = Mapping[str, Any]
"""The arguments of a pipeline's `encode_prompt`, defaults among them."""


def index_of(name: str) -> dict[str, Any]:
    """Return the index of a local folder, without what embeds prompts, or that of a published model
    as far as plans need it.

    Raises UserError for a hub id whose architecture is not known.
    """
    if Path(name).is_dir():
        index = read_index(resolve(name), name, None)
        return {key: entry for key, entry in index.items() if not _is_of_text(entry)}
    if name not in PUBLISHED:
        raise UserError(
            f"model.pretrained={name}: unknown architecture; give a local folder, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    return {"_class_name": PUBLISHED[name].pipeline.__name__}


def _is_of_text(entry: Any) -> bool:
    """Tell whether an entry of an index is a component that embeds prompts."""
    return isinstance(entry, list) and entry[0] == "transformers"


def pipeline_on_meta(source: Source, index: Mapping[str, Any]) -> Any:
    """Make a pipeline with neither weights nor text encoders; nothing in it computes a number.

    Raises UserError for a class whose prompts or pictures plans cannot count.
    """
    name = source.pretrained.removeprefix(META)
    check_texts(name, source.kind)
    if Path(name).is_dir():
        components, settings = _of_folder(Path(name), index)
    else:
        published = PUBLISHED[name]
        components = {**published.networks(), "vae": published.decoder()}
        settings = dict(published.settings)
    components.setdefault("scheduler", diffusers.FlowMatchEulerDiscreteScheduler())
    for part in components.values():
        if isinstance(part, nn.Module):
            part.to(DTYPES[source.dtype])
    # A pipeline takes None for a component that is left out, but not that its name is missing.
    left_out = dict.fromkeys(source.kind._get_signature_keys(source.kind)[0])
    pipeline = source.kind(**{**left_out, **components, **settings})
    pipeline.set_progress_bar_config(disable=True)
    for network in components_of(pipeline).values():
        if source.quantization is not None:
            quantize(network, source.quantization)
        network.register_forward_pre_hook(_hand_over, with_kwargs=True)
    return pipeline


def _of_folder(folder: Path, index: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the components of a folder on the meta device; return them and the pipeline's
    settings.
    """
    components: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, entry in index.items():
        match entry:
            case ["diffusers", str(kind)]:
                cls: Any = getattr(diffusers, kind)
                with torch.device("meta" if issubclass(cls, nn.Module) else "cpu"):
                    components[name] = cls.from_config(cls.load_config(folder / name))
            case list():
                pass
            case _ if not name.startswith("_"):
                settings[name] = entry
    return components, settings


def _hand_over(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take a network's arguments to the meta device: times stay where calls can compare them."""
    return tree_map_only(Tensor, _to_meta, (args, kwargs))


def _to_meta(value: Tensor) -> Tensor:
    return value.to("meta")


def check_texts(name: str, kind: type[Any]) -> None:
    """Raise UserError, in one line that says what is missing, for a pipeline that cannot be
    planned.
    """
    if use_of(kind) != "never":
        raise UserError(
            f"model.pretrained={name}: a {kind.__name__} takes pictures with prompts, whose tokens "
            "plans do not count; a short run measures it"
        )
    if kind.__name__ not in TEXTS:
        raise UserError(
            f"model.pretrained={name}: plans do not know what a {kind.__name__} encodes prompts "
            f"to, but of {', '.join(TEXTS)}; a short run measures it"
        )


def reading_blanks(pipeline: Any) -> Any:
    """Return a twin of the pipeline, on the same networks, that encodes prompts to zeros of the
    shapes of its texts, on the CPU, where what it prepares can be looked at.
    """
    kind = type(pipeline)
    texts = TEXTS[kind.__name__]
    signature = inspect.signature(kind.encode_prompt)

    @wraps(kind.encode_prompt)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return texts(self, bound.arguments)

    twin = copy.copy(pipeline)
    twin.__class__ = type(kind.__name__, (Placed, kind), {"encode_prompt": encode_prompt})
    twin.place = torch.device("cpu")
    return twin


def _rows(given: Given) -> int:
    prompt = given["prompt"]
    return 1 if isinstance(prompt, str) else len(prompt)


def _features(pipeline: Any, given: Given, width: int) -> Tensor:
    """Return what a text encoder would give: tokens of so many features."""
    shape = (_rows(given), given["max_sequence_length"], width)
    return torch.zeros(shape, dtype=pipeline.transformer.dtype)


def _mask(given: Given, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(_rows(given), given["max_sequence_length"], dtype=dtype)


def _qwen_image(pipeline: Any, given: Given) -> Any:
    # There is a mask beside rows of different lengths alone.
    return _features(pipeline, given, pipeline.transformer.config.joint_attention_dim), None


def _z_image(pipeline: Any, given: Given) -> Any:
    rows = list(_features(pipeline, given, pipeline.transformer.config.cap_feat_dim))
    negative = [row.clone() for row in rows] if given["do_classifier_free_guidance"] else []
    return rows, negative


def _sana(pipeline: Any, given: Given) -> Any:
    features = _features(pipeline, given, pipeline.transformer.config.caption_channels)
    if not given["do_classifier_free_guidance"]:
        return features, _mask(given), None, None
    return features, _mask(given), features.clone(), _mask(given)


def _wan(pipeline: Any, given: Given) -> Any:
    features = _features(pipeline, given, pipeline.transformer.config.text_dim)
    return features, features.clone() if given["do_classifier_free_guidance"] else None


def _hunyuan_video(pipeline: Any, given: Given) -> Any:
    config = pipeline.transformer.config
    features = _features(pipeline, given, config.text_embed_dim)
    pooled = torch.zeros(_rows(given), config.pooled_projection_dim, dtype=features.dtype)
    return features, pooled, _mask(given)


def _ltx_video(pipeline: Any, given: Given) -> Any:
    features = _features(pipeline, given, pipeline.transformer.config.caption_channels)
    mask = _mask(given, torch.bool)
    if not given["do_classifier_free_guidance"]:
        return features, mask, None, None
    return features, mask, features.clone(), mask.clone()


TEXTS: Mapping[str, Callable[[Any, Given], Any]] = {
    "QwenImagePipeline": _qwen_image,
    "ZImagePipeline": _z_image,
    "SanaPipeline": _sana,
    "WanPipeline": _wan,
    "HunyuanVideoPipeline": _hunyuan_video,
    "LTXPipeline": _ltx_video,
}
"""What the `encode_prompt` of a pipeline gives, by its class: as the method does, of the same kinds
and shapes.
"""
