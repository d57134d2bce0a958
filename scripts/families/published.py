"""The transformers of published models that have an option over `derived`, by hub id: their class
and its arguments beyond the defaults, as in the `transformer/config.json` of each repository.

Those of models with an adapter of their own are in `flowrl/models/architectures.py`, which plans
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import (
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

WAN21_1300M = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN22_5B = {
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
}
EXPERTS: Mapping[str, tuple[str, ...]] = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": ("transformer", "transformer_2"),
}
"""The components of those that have several networks, which are of one size."""
PUBLISHED: Mapping[str, tuple[type[Any], Mapping[str, Any]]] = {
    "Qwen/Qwen-Image-2512": (QwenImageTransformer2DModel, {}),
    "Qwen/Qwen-Image-Edit-2511": (QwenImageTransformer2DModel, {"zero_cond_t": True}),
    "Tongyi-MAI/Z-Image": (ZImageTransformer2DModel, {}),
    "Tongyi-MAI/Z-Image-Turbo": (ZImageTransformer2DModel, {}),
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": (
        SanaTransformer2DModel,
        {"qk_norm": "rms_norm_across_heads"},
    ),
    "black-forest-labs/FLUX.1-Kontext-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (WanTransformer3DModel, WAN21_1300M),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (WanTransformer3DModel, {}),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (WanTransformer3DModel, {}),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (WanTransformer3DModel, WAN22_5B),
    "hunyuanvideo-community/HunyuanVideo": (HunyuanVideoTransformer3DModel, {}),
    "Lightricks/LTX-Video": (LTXVideoTransformer3DModel, {}),
}
