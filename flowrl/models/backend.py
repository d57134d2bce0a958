"""How a base model's networks are run: memory against speed, without changing what is computed beyond rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowrl.models.protocol import FlowModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Options of diffusers' networks.

    `gradient_checkpointing` recomputes the transformer's blocks in backward passes; without gradients, in rollouts, it
    is off by itself. `attention` is one of diffusers' attention backends, null PyTorch's own choice. `compile` compiles
    the transformer's repeated blocks. `slice_decoding` decodes images one at a time, `tile_decoding` in pieces, whose
    seams are blended.
    """

    gradient_checkpointing: bool
    attention: str | None
    compile: bool
    slice_decoding: bool
    tile_decoding: bool

    def apply(self, model: FlowModel) -> None:
        """Set the options; the adapter must be attached. Raises ValueError for an attention that is not available."""
        transformer: Any = model.transformer
        vae: Any = model.vae
        if self.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if self.attention is not None:
            self._set_attention(transformer, self.attention)
        if self.compile:
            transformer.compile_repeated_blocks()
        if self.slice_decoding:
            vae.enable_slicing()
        if self.tile_decoding:
            vae.enable_tiling()

    def _set_attention(self, transformer: Any, attention: str) -> None:
        processors = transformer.attn_processors.values()
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"backend.attention={attention}: {type(transformer).__name__} always uses PyTorch's attention; set it "
                "to null"
            )
        try:
            transformer.set_attention_backend(attention)
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"backend.attention={attention} cannot be used: {str(error).splitlines()[0]}") from error
