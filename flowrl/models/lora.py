"""LoRA on a diffusers transformer: attach, switch off, read and write. One adapter named `policy`.

Where `flowrl.models.full` was attached instead, the trained weights are all weights, and off means the start's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowrl import sharding
from flowrl.errors import UserError
from flowrl.models.full import at_start, keep_start, start_of
from flowrl.weights import first_not_finite

ADAPTER = "policy"
FOLDER, WHOLE_FOLDER = "lora", "transformer"
"""Where a run exports to: its LoRA, or the whole transformer that full fine-tuning trains."""

WHOLE = "diffusion_pytorch_model"
"""How the files of a whole transformer begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Rank, alpha, target modules (suffixes, or one regular expression) and peft's initialisation of A."""

    rank: int
    alpha: int
    targets: str | Sequence[str]
    init: Literal["gaussian", "kaiming"]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank} must be at least 1")
        if self.init not in ("gaussian", "kaiming"):
            raise UserError(f"lora.init={self.init!r} must be gaussian or kaiming")

    def attach(self, transformer: nn.Module, seed: int) -> None:
        """Add the adapter, seeded and in float32 whatever the base's dtype; B is zero, so the model is unchanged."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _peft(transformer).add_adapter(config, adapter_name=ADAPTER)
        for parameter in parameters(transformer).values():
            parameter.data = parameter.data.float()


def adapter_config(transformer: nn.Module) -> dict[str, Any]:
    """The adapter's peft configuration as plain data, with sets as sorted lists, for an exported file's metadata."""
    config = _peft(transformer).peft_config[ADAPTER].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def save(pipeline: Any, folder: Path) -> None:
    """Write the adapter of a pipeline's transformer so that the stock pipeline's `load_lora_weights` takes it.

    After full fine-tuning, the whole transformer, for its class's `from_pretrained`.
    """
    if start_of(pipeline.transformer) is not None:
        if sharding.is_divided(pipeline.transformer):
            sharding.save(pipeline.transformer, folder)
        else:
            pipeline.transformer.save_pretrained(folder)
        return
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata=adapter_config(pipeline.transformer),
    )


def folder_name(transformer: nn.Module) -> str:
    """What the folder that `save` writes is called."""
    return FOLDER if start_of(transformer) is None else WHOLE_FOLDER


def parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in a fixed order: the adapter's, or all of them."""
    if start_of(transformer) is not None:
        return dict(transformer.named_parameters())
    return {name: parameter for name, parameter in transformer.named_parameters() if f".{ADAPTER}." in name}


@contextmanager
def disabled(transformer: nn.Module) -> Iterator[None]:
    """The reference policy: the base model without its adapter, or as it was before training."""
    start = start_of(transformer)
    if start is not None:
        # Passes of divided weights read them from where they are, not from what parameters point at.
        with (swapped if sharding.is_divided(transformer) else at_start)(transformer, start):
            yield
        return
    _peft(transformer).disable_adapters()
    try:
        yield
    finally:
        _peft(transformer).enable_adapters()


@contextmanager
def swapped(transformer: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other adapter weights (such as the EMA's), then restore the trained ones bitwise."""
    own = parameters(transformer)
    saved = {name: parameter.detach().clone() for name, parameter in own.items()}
    load(transformer, weights)
    try:
        yield
    finally:
        load(transformer, saved)


@torch.no_grad()
def load(transformer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy adapter weights in place. Raises ValueError unless exactly the adapter's names and shapes are given."""
    own = parameters(transformer)
    shapes, given = ({name: value.shape for name, value in group.items()} for group in (own, weights))
    if shapes != given:
        odd = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise UserError(
            f"{len(odd)} weights do not fit, the first {odd[0]!r}: another lora.rank, lora.targets or model?"
        )
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def load_files(transformer: nn.Module, paths: Sequence[Path]) -> None:
    """`load` what some files hold together: a checkpoint's average, or a whole transformer as `save` exports it."""
    constants = dict(transformer.named_buffers())  # exported with the weights, and never trained
    given = {name: value for path in paths for name, value in load_file(path).items() if name not in constants}
    load(transformer, given)


def whole_files(folder: Path) -> list[Path]:
    """The files of a whole transformer in a folder, if that is what it holds."""
    return sorted(folder.glob(f"{WHOLE}*.safetensors"))


def attach_whole(transformer: nn.Module, folder: Path) -> None:
    """Take the weights that full fine-tuning exported, in the transformer's dtype; `disabled` gives the base again.

    Raises ValueError where there are none, and where they are damaged or another architecture's.
    """
    files = whole_files(folder)
    if not files:
        raise UserError(f"{folder}: no transformer there; give the {WHOLE_FOLDER}/ folder of a run with tuning=full")
    keep_start(transformer)
    try:
        load_files(transformer, files)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights do not fit this {type(transformer).__name__} ({error})") from error
    if name := first_not_finite(parameters(transformer)):
        raise UserError(f"{folder}: its weight {name!r} holds NaN or infinity; export an earlier checkpoint")


def load_folder(transformer: nn.Module, folder: Path) -> None:
    """Replace the adapter by the one in a folder that stock pipelines take, whatever its rank and targets.

    Raises ValueError where the folder holds none that fits this transformer, with all its layers.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no LoRA there; give a folder with pytorch_lora_weights.safetensors")
    network = _peft(transformer)
    try:
        with safe_open(files[0], framework="pt") as file:
            keys = [key for key in file.keys() if not key.startswith("text_encoder")]  # noqa: SIM118
        network.delete_adapters(ADAPTER)
        network.load_lora_adapter(str(folder), adapter_name=ADAPTER, use_safetensors=True)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the LoRA does not fit this model ({str(error).splitlines()[0]})") from error
    own, num_given = parameters(transformer), sum(".lora_" in key for key in keys)
    if len(own) != num_given:  # layers that are not there are left out with a warning
        raise UserError(
            f"{folder}: {len(own)} of the LoRA's {num_given} weights fit; it is one of another architecture"
        )
    for parameter in own.values():
        parameter.data = parameter.data.float()


def _peft(transformer: nn.Module) -> Any:
    """diffusers adds peft's methods by a mixin that a type checker does not see through `nn.Module`."""
    return transformer
