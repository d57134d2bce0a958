"""Options that run a base model's networks: memory against speed, without changing what is computed
beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from flowrl.errors import UserError
from flowrl.models.protocol import FlowModel
from flowrl.values.bounds import Text

FLASH_3 = "_flash_3"
"""The one of diffusers' FlashAttention backends that it wraps into an operator without a
derivative.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Options of diffusers' networks.

    `gradient_checkpointing` recomputes the transformer's blocks in backward passes; without
    gradients, in rollouts, it is off by itself. `attention` is one of diffusers' attention
    backends, null PyTorch's own choice. `compile` compiles each of the transformer's blocks in
    place, so that no weight changes its name. `slice_decoding` decodes images one at a time,
    `tile_decoding` in pieces, whose seams are blended.
    """

    gradient_checkpointing: bool
    attention: Text | None
    compile: bool
    slice_decoding: bool
    tile_decoding: bool

    def apply(self, model: FlowModel) -> None:
        """Set the options; the adapter must be attached. Raises UserError for an attention that is
        not available, and for an option that a network of the model does not have.
        """
        transformer: Any = model.transformer
        vae: Any = model.vae
        if self.gradient_checkpointing:
            _switch_on("gradient_checkpointing", transformer.enable_gradient_checkpointing)
        if self.attention is not None:
            self._set_attention(transformer, self.attention)
        if self.compile:
            _compile_blocks(transformer)
        if self.slice_decoding:
            _switch_on("slice_decoding", vae.enable_slicing)
        if self.tile_decoding:
            _switch_on("tile_decoding", vae.enable_tiling)

    def _set_attention(self, transformer: Any, attention: str) -> None:
        """Set the attention of all blocks. Raises UserError for one that cannot train, that the
        transformer does not ask for, or that this machine does not have.
        """
        if "sage" in attention or attention == FLASH_3:
            other = f"{FLASH_3}_hub" if attention == FLASH_3 else "another"
            raise UserError(
                f"backend.attention={attention} has no backward pass in diffusers, so nothing "
                f"before an attention would be trained; choose {other}, or null"
            )
        processors = getattr(transformer, "attn_processors", {}).values()
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise UserError(
                f"backend.attention={attention}: {type(transformer).__name__} always uses "
                "PyTorch's attention; set it to null"
            )
        try:
            transformer.set_attention_backend(attention)
        except (ValueError, RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"backend.attention={attention} cannot be used: {reason}") from error


def _switch_on(option: str, switch: Callable[[], None]) -> None:
    """Switch an option of a network on. Raises UserError, naming the key, where it has none."""
    try:
        switch()
    except (NotImplementedError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"backend.{option}=true: {reason.rstrip('.')}; set it to false") from error


def _compile_blocks(transformer: nn.Module) -> None:
    """Compile each block in place.

    diffusers' own `compile_repeated_blocks` does not know SD3's; all families keep their blocks in
    module lists.
    """
    from torch import _dynamo, _inductor  # slow to import

    # Programs with and without gradients are fused differently. Unless each operator's result is
    # rounded to its dtype, as without compilation, a bfloat16 replay is further from its rollout
    # than the smallest thresholds.
    _inductor.config.emulate_precision_casts = True
    # With and without gradients, LoRA on and off, and a few batch sizes, times the kinds of block:
    # beyond PyTorch's 8 programs for one piece of code it would go on uncompiled, with a warning
    # alone.
    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, 64)
    for child in transformer.children():
        if isinstance(child, nn.ModuleList):
            for block in child:
                block.compile()
