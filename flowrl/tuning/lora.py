"""LoRA on a diffusers transformer: attach, switch off, read and write. One adapter named `policy`.

Where `flowrl.tuning.full` was attached instead, the trained weights are all weights, and off means
the start's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models.weights import first_not_finite
from flowrl.parallel import sharding
from flowrl.tuning import formats
from flowrl.tuning.formats import LoRAFile
from flowrl.tuning.full import at_start, keep_start, start_of
from flowrl.tuning.writer import lora_config
from flowrl.values.bounds import Alpha, Expression, Rank, Text

ADAPTER = "policy"
_REFERENCE = "_flowrl_reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """Rank, alpha, target modules (suffixes, or one regular expression) and peft's initialisation
    of A.

    With `start`, a LoRA file or folder, training begins from that LoRA. Its layers, ranks and
    alphas are then the adapter's: those given here must be its own, or null. `reference` says what
    the policy is held near and measured against: `start`, the model that training began with, or
    `base`, the base model alone.
    """

    rank: Rank | None
    alpha: Alpha | None
    targets: Expression | Sequence[Text] | None
    init: Literal["gaussian", "kaiming"]
    start: Text | None = None  # runs of earlier versions have neither this key nor the next
    reference: Literal["start", "base"] = "start"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"lora.rank={self.rank} must be at least 1")
        if self.init not in ("gaussian", "kaiming"):
            raise UserError(f"lora.init={self.init!r} must be gaussian or kaiming")
        if self.reference not in ("start", "base"):
            raise UserError(f"lora.reference={self.reference!r} must be start or base")
        for key in ("rank", "alpha", "targets"):
            if self.start is None and getattr(self, key) is None:
                raise UserError(
                    f"lora.{key}=null is for lora.start=FILE, whose it then is; give a value"
                )

    def attach(self, transformer: nn.Module, seed: int) -> None:
        """Add the adapter in float32, whatever the base's dtype: that of `start`, or a fresh one,
        seeded.

        B of a fresh one is zero, so that the model is unchanged.
        """
        if self.start is not None:
            given = self.read_start()
            self.check_targets(given, transformer)
            attach(given, transformer, Path(self.start))
            if self.reference == "start":
                keep_reference(transformer, given)
            return
        assert self.rank is not None and self.targets is not None
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes any number
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _add(transformer, config)

    def read_start(self) -> LoRAFile:
        """The LoRA of `start`. Raises UserError where rank or alpha are set and are not its own."""
        assert self.start is not None
        given = formats.read(Path(self.start))
        for key, values in (
            ("rank", set(given.ranks.values())),
            ("alpha", set(given.alpha.values())),
        ):
            wanted = getattr(self, key)
            if wanted is not None and values != {wanted}:
                numbers = " and ".join(f"{value:g}" for value in sorted(values))
                raise UserError(
                    f"lora.{key}={wanted}, but lora.start={self.start} has {key} {numbers}; "
                    f"lora.{key}=null takes its"
                )
        return given

    def check_targets(self, given: LoRAFile, transformer: nn.Module) -> None:
        """Raise UserError where targets are set and are not exactly the layers of the LoRA that is
        started from.
        """
        if self.targets is None:
            return
        config = LoraConfig(
            target_modules=self.targets if isinstance(self.targets, str) else list(self.targets)
        )
        linear = [
            name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)
        ]
        wanted = {name for name in linear if check_target_module_exists(config, name)}
        if wanted != given.a.keys():
            raise UserError(
                f"lora.targets matches {len(wanted)} layers, {len(wanted & given.a.keys())} of "
                "which are among the "
                f"{len(given.a)} of lora.start={self.start}; lora.targets=null takes its"
            )


def attach(given: LoRAFile, transformer: nn.Module, path: Path) -> None:
    """Add the LoRA of the file `path` as the transformer's adapter, in float32.

    Raises UserError where it does not fit.
    """
    formats.check(given, transformer, path)
    _add(transformer, lora_config(given))
    load(transformer, _weights(given))


def _weights(given: LoRAFile) -> dict[str, Tensor]:
    """A file's matrices under the names of the adapter's parameters."""
    matrices = {f"{name}.lora_A.{ADAPTER}.weight": value for name, value in given.a.items()}
    return matrices | {f"{name}.lora_B.{ADAPTER}.weight": value for name, value in given.b.items()}


def _add(transformer: nn.Module, config: LoraConfig) -> None:
    _peft(transformer).add_adapter(config, adapter_name=ADAPTER)
    for parameter in parameters(transformer).values():
        parameter.data = parameter.data.float()


def keep_reference(transformer: nn.Module, given: LoRAFile) -> None:
    """Make the base with this LoRA the reference, in place of the base alone; its layers must be
    the adapter's.
    """
    weights = _weights(given)
    _check_shapes(
        parameters(transformer), {name: tuple(value.shape) for name, value in weights.items()}
    )
    transformer.__dict__[_REFERENCE] = weights  # a plain attribute: no part of the module's state


def reference_of(transformer: nn.Module) -> dict[str, Tensor] | None:
    """The reference's weights by name, which stand in place of the trained ones; None where it is
    the base alone.
    """
    reference: dict[str, Tensor] | None = transformer.__dict__.get(_REFERENCE)
    return start_of(transformer) if reference is None else reference


def adapter_config(transformer: nn.Module) -> dict[str, Any]:
    """The adapter's peft configuration as plain data, with sets as sorted lists, for an exported
    file's metadata.
    """
    config = _peft(transformer).peft_config[ADAPTER].to_dict()
    return {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }


def save(pipeline: Any, folder: Path) -> None:
    """Write the adapter of a pipeline's transformer so that the stock pipeline's
    `load_lora_weights` takes it.

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
        transformer_lora_layers=get_peft_model_state_dict(
            pipeline.transformer, adapter_name=ADAPTER
        ),
        transformer_lora_adapter_metadata=adapter_config(pipeline.transformer),
    )


def folder_name(transformer: nn.Module) -> str:
    """What the folder that `save` writes is called."""
    return formats.FOLDER if start_of(transformer) is None else formats.WHOLE_FOLDER


def parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in a fixed order: the adapter's, or all of them."""
    if start_of(transformer) is not None:
        return dict(transformer.named_parameters())
    return {
        name: parameter
        for name, parameter in transformer.named_parameters()
        if f".{ADAPTER}." in name
    }


@contextmanager
def at_reference(transformer: nn.Module) -> Iterator[None]:
    """The reference policy: the base model without its adapter, or with the one that training began
    from.

    After full fine-tuning, the model as it was before training.
    """
    reference = reference_of(transformer)
    if reference is not None:
        # Passes of divided weights read them from where they are, not from what parameters point
        # at.
        with (swapped if sharding.is_divided(transformer) else at_start)(transformer, reference):
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
    """Copy adapter weights in place. Raises UserError unless exactly the adapter's names and shapes
    are given.
    """
    own = parameters(transformer)
    _check_shapes(own, {name: tuple(value.shape) for name, value in weights.items()})
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def _check_shapes(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless exactly the names and shapes of `weights` are given."""
    wanted = {name: tuple(value.shape) for name, value in weights.items()}
    odd = sorted(
        name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)
    )
    if odd:
        raise UserError(
            f"{len(odd)} weights do not fit, the first {odd[0]!r}: another lora.rank, lora.targets "
            "or model?"
        )


def load_files(transformer: nn.Module, paths: Sequence[Path]) -> None:
    """`load` what some files hold together: a checkpoint's average, or a whole transformer as
    `save` exports it.
    """
    constants = dict(transformer.named_buffers())  # exported with the weights, and never trained
    given = {
        name: value
        for path in paths
        for name, value in load_file(path).items()
        if name not in constants
    }
    load(transformer, given)


def attach_whole(transformer: nn.Module, folder: Path) -> None:
    """Take the weights that full fine-tuning exported, in the transformer's dtype; `at_reference`
    gives the base again.

    Raises UserError where there are none, and where they are damaged or another architecture's.
    """
    files = formats.whole_files(folder)
    if not files:
        name = formats.WHOLE_FOLDER
        raise UserError(
            f"{folder}: no transformer there; give the {name}/ folder of a run with tuning=full"
        )
    keep_start(transformer)
    try:
        load_files(transformer, files)
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the weights do not fit this {type(transformer).__name__} ({error})"
        ) from error
    if bad := first_not_finite(parameters(transformer)):
        raise UserError(
            f"{folder}: its weight {bad!r} holds NaN or infinity; export an earlier checkpoint"
        )


def check_whole(transformer: nn.Module, paths: Sequence[Path]) -> None:
    """Raise UserError unless some files together hold every weight of the transformer; only their
    heads are read.
    """
    constants = dict(transformer.named_buffers())
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); export it again") from error
    try:
        kept = {name: shape for name, shape in shapes.items() if name not in constants}
        _check_shapes(dict(transformer.named_parameters()), kept)
    except UserError as error:
        raise UserError(
            f"{paths[0]}: the weights do not fit this {type(transformer).__name__} ({error})"
        ) from error


def _peft(transformer: nn.Module) -> Any:
    """diffusers adds peft's methods by a mixin that a type checker does not see through
    `nn.Module`.
    """
    return transformer
