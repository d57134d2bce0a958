"""The names that LoRA files give their tensors, and how they tell their scale: what is read, what
is passed over, and what is refused.

Everything that is refused has a name of its own, so that the reason is the true one: most of what
cannot be read here would otherwise look like a LoRA of another architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from peft.utils.other import get_pattern_key

from flowrl.errors import UserError

Format = Literal["diffusers", "peft", "comfy"]
NAMES: Mapping[Format, str] = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "comfy": "lora.safetensors",
}
"""File names, of which diffusers and peft look for theirs in a folder."""
PREFIXES: Mapping[Format, str] = {
    "diffusers": "transformer.",
    "peft": "base_model.model.",
    "comfy": "transformer.",
}
"""ComfyUI knows the layers of SD3, FLUX.1 and FLUX.2 under diffusers' names, and reads alpha from a
tensor each.
"""

METADATA = "lora_adapter_metadata"
"""The key under which diffusers keeps peft's configuration in a file."""

_PREFIX = r"(?:(?:transformer|base_model\.model|diffusion_model)\.)?"
_MATRIX = re.compile(
    _PREFIX + r"(?P<layer>.+)\.lora_(?P<matrix>A|B|down|up)\.(?:(?P<adapter>\w+)\.)?weight"
)
_ALPHA = re.compile(_PREFIX + r"(?P<layer>.+)\.alpha")
_TEXT = re.compile(r"text_encoders?(_\d)?\.")

_CONVERT = (
    "let diffusers convert it, where it can: pipe.load_lora_weights(FILE, adapter_name='x'), then "
    "pipe.transformer.save_lora_adapter(FOLDER, adapter_name='x')"
)
_RETRAIN = "train a plain LoRA, or fuse this one into the base and give that as model.pretrained"

KINDS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("DoRA", re.compile(r"lora_magnitude_vector|dora_scale"), _RETRAIN),
    ("LoKr", re.compile(r"\.lokr_"), _RETRAIN),
    ("LoHa", re.compile(r"\.hada_"), _RETRAIN),
    ("OFT", re.compile(r"\.oft_"), _RETRAIN),
    ("LoCon, a LoRA with a third matrix", re.compile(r"\.lora_mid\."), _RETRAIN),
    ("a LoRA with biases", re.compile(r"\.lora_[AB]\.(\w+\.)?bias$|\.diff_b$"), _RETRAIN),
    ("a difference of whole weights", re.compile(r"\.diff$"), _RETRAIN),
    (
        "a LoRA under kohya's names of layers",
        re.compile(r"lora_(unet|transformer|te\d?|prior)_"),
        _CONVERT,
    ),
    (
        "a LoRA under the names of layers of the model's first code, not of diffusers",
        re.compile(r"(^|\.)(double_blocks|single_blocks|joint_blocks)\.\d"),
        _CONVERT,
    ),
)
"""What other programs write that cannot be taken: its name, the keys that tell it, and the remedy.
"""

_SETTINGS = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA with biases",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
}
_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Those initialisations of peft's that change the base, which must then be changed alike."""


def refuse_kinds(keys: Iterable[str], file: object) -> None:
    """Raise UserError, by its name, for what other programs write and is not read here."""
    # Sorted, so that the key that is quoted does not depend on the file's order.
    keys = sorted(keys)
    for name, pattern, remedy in KINDS:
        telling_keys = [key for key in keys if pattern.search(key)]
        if telling_keys:
            telling = f"{name} ({telling_keys[0]!r})"
            raise UserError(f"{file} holds {telling}, which is not read here; {remedy}")


def refuse_settings(config: Mapping[str, Any], file: object) -> None:
    """Raise UserError, by its name, for a setting of peft under which A, B and alpha are not all
    there is.
    """
    kind = str(config.get("peft_type") or "LORA").removeprefix("PeftType.")
    if kind != "LORA":
        raise UserError(
            f"{file} holds an adapter of peft_type={kind}, which is not read here; {_RETRAIN}"
        )
    for key, name in _SETTINGS.items():
        if config.get(key):
            raise UserError(
                f"{file} holds {name} ({key}={config[key]}), which is not read here; {_RETRAIN}"
            )
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_INITS):
        raise UserError(
            f"{file}: init_lora_weights={init} changed the base as well, so the file alone is not "
            "the LoRA; convert it with save_pretrained's path_initial_model_for_weight_conversion"
        )


def is_text_encoders(key: str) -> bool:
    """Tell whether a key belongs to a text encoder, which is never trained here."""
    return _TEXT.match(key) is not None


def matrix_of(key: str) -> tuple[str, str, str] | None:
    """Return the layer, the matrix (`A` or `B`) and the adapter (empty where none is named) of a
    key; None where it is no matrix's.
    """
    match = _MATRIX.fullmatch(key)
    if match is None:
        return None
    # A leads down to the rank, B up from it; older programs name the matrices so.
    name = match["matrix"]
    matrix = {"down": "A", "up": "B"}.get(name, name)
    return match["layer"], matrix, match["adapter"] or ""


def alpha_of(key: str) -> str | None:
    """Return the layer whose alpha a key holds; None for any other key."""
    match = _ALPHA.fullmatch(key)
    return match["layer"] if match else None


def alpha_by_settings(config: Mapping[str, Any], layer: str, rank: int, file: object) -> float:
    """Return a layer's alpha as peft's configuration tells it, by pattern and by rank-stabilised
    scaling (alpha / sqrt(rank)).

    With the alpha that is returned, alpha / rank is the layer's scale in every case. Raises
    UserError for one that is no number.
    """
    patterns: Mapping[str, Any] = config.get("alpha_pattern") or {}
    # peft's function returns the pattern that matches, or else the layer, which is then no key.
    pattern = get_pattern_key(list(patterns), layer)
    alpha = patterns.get(pattern, config["lora_alpha"])
    # To Python a boolean is a number too.
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(
            f"{file}: alpha={alpha!r} of {layer!r} must be a number; export the LoRA again"
        )
    return float(alpha) * (rank**0.5 if config.get("use_rslora") else 1.0)
