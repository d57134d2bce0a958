"""LoRA on a diffusers transformer: an adapter named `policy` is attached, switched off and
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models.experts import networks_of
from flowrl.parallel import sharding
from flowrl.tuning import formats
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.lora_layers import Compute, check_compute, set_compute
from flowrl.tuning.targets import AUTO, targets_of
from flowrl.tuning.weights import in_place_of_trained, load, refer_to
from flowrl.tuning.writer import lora_config, pattern_of, plain_settings, write
from flowrl.values.bounds import Alpha, Expression, Rank, Text
from flowrl.values.check import check_fields

ADAPTER = "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA:
    """The recipe of a LoRA: rank, alpha, target modules (suffixes, or one regular expression) and
    peft's initialisation of A.

    A layer adds alpha / rank B A x to its output. With `start`, a LoRA file or folder, training
    begins from that LoRA. Its layers, ranks and alphas are then the adapter's: those given here
    must be its own, or null. `reference` says what the policy is held near and measured against:
    `start`, the model that training began with, or `base`, the base model alone. `compute` says
    how a layer computes its sum (`Compute`). Raises UserError where `start` is null and one of the
    first three keys is too.
    """

    rank: Rank | None
    alpha: Alpha | None
    targets: Expression | Sequence[Text] | None
    init: Literal["gaussian", "kaiming"]
    # Runs of earlier versions have none of these three keys.
    start: Text | None = None
    reference: Literal["start", "base"] = "start"
    compute: Compute = "adapter"

    def __post_init__(self) -> None:
        check_fields(self, "lora")
        for key in ("rank", "alpha", "targets"):
            if self.start is None and getattr(self, key) is None:
                raise UserError(
                    f"lora.{key}=null is for lora.start=FILE, whose it then is; give a value"
                )

    def check_layers(self, transformer: nn.Module) -> None:
        """Raise UserError, naming the key, where no linear layer is meant or all are narrower than
        the rank, which would only cost, or where `compute` does not suit the weights. A LoRA that
        is started from is compared as a whole.
        """
        networks = networks_of(transformer)
        for network in networks.values():
            if not hasattr(network, "add_adapter"):
                raise UserError(
                    f"tuning=lora: diffusers adds no LoRA to a {type(network).__name__}; set "
                    "tuning=full"
                )
        layers = formats.linear_layers(transformer)
        check_compute(self.compute, layers.values())
        if self.start is not None:
            return
        assert self.rank is not None and self.targets is not None
        meant = self._layers_meant(transformer)
        widths = [min(layers[name].in_features, layers[name].out_features) for name in meant]
        if not widths:
            # The last layer is a better example than the first ones, which embed time and text.
            example = next(reversed(layers), "none")
            raise UserError(
                f"lora.targets={self.targets} names no linear layer of the model, whose layers are "
                f"such as {example}"
            )
        self._check_reach(networks, meant)
        if self.rank > max(widths):
            raise UserError(
                f"lora.rank={self.rank} must be at most {max(widths)}, the width of the widest "
                "layer that lora.targets names: a higher rank adds nothing"
            )

    def _check_reach(self, prefixes: Iterable[str], meant: set[str]) -> None:
        """Raise UserError for a network of which no layer is meant; layers' names begin with their
        network's prefix.
        """
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in meant):
                raise UserError(
                    f"lora.targets={self.targets} names no layer of {prefix.removesuffix('.')}, "
                    "which would go untrained; name layers of all networks"
                )

    def _layers_meant(self, transformer: nn.Module) -> set[str]:
        """Return the names of the transformer's layers that the targets mean."""
        # peft itself is asked, with a configuration that has nothing else to say.
        config = LoraConfig(target_modules=self._targets_on(transformer))
        names = formats.linear_layers(transformer)
        return {name for name in names if check_target_module_exists(config, name)}

    def attach(self, transformer: nn.Module, seed: int) -> Adapter:
        """Add the adapter in float32, whatever the base's dtype: that of `start`, or a fresh one,
        seeded.

        B of a fresh one is zero, so that the model is unchanged. Raises UserError where the LoRA of
        `start` does not fit the transformer or the other keys.
        """
        if self.start is not None:
            lora_file = self.read_start()
            self.check_targets(lora_file, transformer)
            adapter = attach_file(lora_file, transformer, Path(self.start), compute=self.compute)
            # Without that, the reference is the base: the adapter is switched off.
            if self.reference == "start":
                refer_to(adapter, weights_of(lora_file))
            return adapter
        assert self.rank is not None
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft takes any number
            target_modules=self._targets_on(transformer),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )
        # peft draws A from the CPU's global generator, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _add(transformer, config, self.compute)

    def read_start(self) -> LoRAFile:
        """Read the LoRA of `start`. Raises UserError for a rank or alpha that is not the file's."""
        assert self.start is not None
        lora_file = formats.read(Path(self.start))
        self._check_number("rank", self.rank, lora_file.ranks.values())
        self._check_number("alpha", self.alpha, lora_file.alpha.values())
        return lora_file

    def _check_number(self, key: str, wanted: float | None, values: Iterable[float]) -> None:
        """Raise UserError where a number is set and is not that of all layers of `start`."""
        numbers = sorted(set(values))
        if wanted is not None and numbers != [wanted]:
            words = " and ".join(f"{number:g}" for number in numbers)
            raise UserError(
                f"lora.{key}={wanted}, but lora.start={self.start} has {key} {words}; "
                f"lora.{key}=null takes its"
            )

    def check_targets(self, lora_file: LoRAFile, transformer: nn.Module) -> None:
        """Raise UserError where targets are set and are not exactly the layers of the LoRA that is
        started from.
        """
        if self.targets is None:
            return
        wanted = self._layers_meant(transformer)
        layers = lora_file.a.keys()
        if wanted != layers:
            raise UserError(
                f"lora.targets matches {len(wanted)} layers, {len(wanted & layers)} of which are "
                f"among the {len(layers)} of lora.start={self.start}; lora.targets=null takes its"
            )

    def _targets_on(self, transformer: nn.Module) -> str | list[str]:
        """Return the targets as peft takes them: those of the transformer's class for `auto`."""
        assert self.targets is not None
        if self.targets == AUTO:
            return targets_of(transformer)
        return self.targets if isinstance(self.targets, str) else list(self.targets)


class Adapter:
    """The adapter that `_add` put on a transformer, with the base alone as the reference unless
    `refer_to` gives another.
    """

    folder_name: ClassVar[str] = formats.FOLDER
    reference: dict[str, Tensor] | None = None

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        # Looked for once: a large model has thousands of modules, and every term asks for these.
        self._layers = [
            layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)
        ]
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name, _ in transformer.named_parameters():
            if f".{ADAPTER}." in name:
                module, _, attribute = name.rpartition(".")
                self._places[name] = (transformer.get_submodule(module), attribute)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: getattr(*place) for name, place in self._places.items()}

    @contextmanager
    def at_reference(self) -> Iterator[None]:
        """Run the base model without its adapter, or with the one that training began from.

        Nothing may be backpropagated meanwhile.
        """
        if self.reference is not None:
            with in_place_of_trained(self.transformer, self.parameters(), self.reference):
                yield
            return
        with self.at_base():
            yield

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Run the base model without its adapter. Nothing may be backpropagated meanwhile."""
        self._switch(is_on=False)
        try:
            yield
        finally:
            self._switch(is_on=True)

    def _switch(self, *, is_on: bool) -> None:
        for layer in self._layers:
            layer.enable_adapters(is_on)

    def save(self, pipeline: Any, folder: Path) -> None:
        """Write the adapter so that the stock pipeline's `load_lora_weights` takes it, network by
        network; where it has none, so that its transformer's `load_lora_adapter` does.
        """
        layers = get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER)
        if sharding.is_divided(self.transformer):
            layers = sharding.gathered_by_first(layers)
            if layers is None:
                return
        # diffusers' loaders take one network's LoRA from a file, and its writers write one.
        is_several = len(networks_of(self.transformer)) > 1
        if is_several or not hasattr(pipeline, "save_lora_weights"):
            write(self._file_of(layers), folder, "diffusers")
            return
        config = _peft(self.transformer).peft_config[ADAPTER]
        pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=plain_settings(config),
        )

    def _file_of(self, layers: Mapping[str, Tensor]) -> LoRAFile:
        """Return the content of a LoRA file with peft's tensors of this adapter."""
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for key, value in layers.items():
            layer, _, matrix = key.removesuffix(".weight").rpartition(".")
            (a if matrix == "lora_A" else b)[layer] = value.detach().cpu()
        config = _peft(self.transformer).peft_config[ADAPTER]
        # Layers that differ from the common alpha have a pattern of their whole name.
        alpha = {
            name: float(config.alpha_pattern.get(pattern_of(name), config.lora_alpha)) for name in a
        }
        return LoRAFile(a, b, alpha)


def attach_file(
    lora_file: LoRAFile, transformer: nn.Module, path: Path, *, compute: Compute = "adapter"
) -> Adapter:
    """Add the LoRA of the file `path` as the transformer's adapter, in float32.

    Raises UserError where it does not fit.
    """
    formats.check(lora_file, transformer, path)
    adapter = _add(transformer, lora_config(lora_file), compute)
    load(adapter.parameters(), weights_of(lora_file))
    return adapter


def weights_of(lora_file: LoRAFile) -> dict[str, Tensor]:
    """Return a file's matrices under the names of the adapter's parameters."""
    weights = {}
    for name, value in lora_file.a.items():
        weights[f"{name}.lora_A.{ADAPTER}.weight"] = value
    for name, value in lora_file.b.items():
        weights[f"{name}.lora_B.{ADAPTER}.weight"] = value
    return weights


def _add(transformer: nn.Module, config: LoraConfig, compute: Compute) -> Adapter:
    """Add an adapter by peft's configuration of it, and hold its weights in float32."""
    set_compute(config, compute)
    _peft(transformer).add_adapter(config, adapter_name=ADAPTER)
    adapter = Adapter(transformer)
    # diffusers adds it in the base's dtype, in which small steps of an optimizer would be lost.
    for parameter in adapter.parameters().values():
        parameter.data = parameter.data.float()
    return adapter


def _peft(transformer: nn.Module) -> Any:
    """Return the transformer as one with peft's methods, which diffusers adds by a mixin that a
    type checker does not see through `nn.Module`.
    """
    return transformer
