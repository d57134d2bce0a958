"""Options that run a base model's networks: memory against speed, without changing what is computed
beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flowrl.errors import UserError, first_line
from flowrl.models.experts import networks_of
from flowrl.models.protocol import FlowModel
from flowrl.values.bounds import Text

FLASH_3 = "_flash_3"
"""The one of diffusers' FlashAttention backends that it wraps into an operator without a
derivative.
"""

KERNELS: Mapping[str, Callable[[bool], None]] = {
    "_native_flash": torch.backends.cuda.enable_flash_sdp,
    "_native_efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "_native_cudnn": torch.backends.cuda.enable_cudnn_sdp,
    "_native_math": torch.backends.cuda.enable_math_sdp,
}
"""Switches of PyTorch's kernels of attention, on CPUs and GPUs, by diffusers' names."""
IS_ALLOWED: Mapping[str, Callable[[], bool]] = {
    "_native_flash": torch.backends.cuda.flash_sdp_enabled,
    "_native_efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "_native_cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "_native_math": torch.backends.cuda.math_sdp_enabled,
}
"""How the switches stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Options of diffusers' networks.

    `gradient_checkpointing` recomputes the transformer's blocks in backward passes, and the
    autoencoder's where gradients go through it; without gradients, in rollouts, it is off by
    itself. `attention` is one of diffusers' attention
    backends, null PyTorch's own choice; a network that always uses PyTorch's takes those that are
    kernels of PyTorch's, and then all attention of the process is computed by it. `compile`
    compiles each of the transformer's blocks in place, so that no weight changes its name.
    `slice_decoding` decodes images one at a time, `tile_decoding` in pieces, whose seams are
    blended.
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
        # Another model of this process may have asked for one kernel.
        _allow_kernels(KERNELS)
        if self.gradient_checkpointing:
            _switch_on("gradient_checkpointing", lambda: recompute_blocks(model, True))
        networks = networks_of(transformer).values()
        if self.attention is not None:
            for network in networks:
                self._set_attention(network, self.attention)
        if self.compile:
            for network in networks:
                _compile_blocks(network)
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
            if attention not in KERNELS:
                raise UserError(
                    f"backend.attention={attention}: {type(transformer).__name__} always uses "
                    f"PyTorch's attention; set it to null, or to one of {', '.join(KERNELS)}"
                )
            _allow_kernels([attention])
            return
        try:
            transformer.set_attention_backend(attention)
        except (ValueError, RuntimeError, ImportError) as error:
            reason = first_line(error)
            raise UserError(f"backend.attention={attention} cannot be used: {reason}") from error


def recompute_blocks(model: FlowModel, is_on: bool) -> None:
    """Let backward passes recompute the blocks of the transformer, and those of an autoencoder that
    can: only a loss of kind direct passes gradients through decoding. Raises ValueError for a
    transformer that cannot.
    """
    networks: list[Any] = [model.transformer]
    if getattr(model.vae, "_supports_gradient_checkpointing", False):
        networks.append(model.vae)
    for network in networks:
        if is_on:
            network.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()


def variants(transformer: Any) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Yield what else a network could be run with, by its override and a context in which it holds:
    no gradient checkpointing where there is some, and each of PyTorch's kernels of attention.

    Compilation cannot be undone, and is left out.
    """
    if getattr(transformer, "is_gradient_checkpointing", False):
        yield "backend.gradient_checkpointing=false", _without_checkpointing(transformer)
    for name in KERNELS:
        yield f"backend.attention={name}", _with_kernel(name)


@contextmanager
def _without_checkpointing(transformer: Any) -> Iterator[None]:
    transformer.disable_gradient_checkpointing()
    try:
        yield
    finally:
        transformer.enable_gradient_checkpointing()


@contextmanager
def _with_kernel(name: str) -> Iterator[None]:
    allowed = [other for other, is_allowed in IS_ALLOWED.items() if is_allowed()]
    _allow_kernels([name])
    try:
        yield
    finally:
        _allow_kernels(allowed)


def _allow_kernels(names: Collection[str]) -> None:
    """Let PyTorch compute attention by these of its kernels, in the whole process."""
    for name, allow in KERNELS.items():
        allow(name in names)


def _switch_on(option: str, switch: Callable[[], None]) -> None:
    """Switch an option of a network on. Raises UserError, naming the key, where it has none."""
    try:
        switch()
    except (NotImplementedError, ValueError) as error:
        reason = first_line(error)
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
