"""Full fine-tuning: every weight of the transformer is trained, and a frozen copy of the start is
the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models.experts import networks_of
from flowrl.models.quantization import is_quantized
from flowrl.models.weights import first_not_finite
from flowrl.parallel import sharding
from flowrl.tuning import formats
from flowrl.tuning.weights import check_shapes, in_place_of_trained, load
from flowrl.values.bounds import Text

OTHER_MODEL = "give the model that they were trained on"
"""What to do about weights of a whole transformer that do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Full:
    """The recipe that stands where a LoRA's would: `attach` makes all weights trainable.

    `dtype` is the model's, and must be float32; UserError is raised for any other.
    """

    dtype: Text

    def __post_init__(self) -> None:
        if self.dtype != "float32":
            raise UserError(
                f"model.dtype={self.dtype} with tuning=full: an optimizer's small steps are lost "
                f"in the rounding of {self.dtype} weights; set model.dtype=float32"
            )

    def check_layers(self, transformer: nn.Module) -> None:
        """Raise UserError for quantised weights, and for a pipeline of several networks, which no
        export would hold.
        """
        if is_quantized(transformer):
            raise UserError(
                "tuning=full trains all weights, and quantised ones cannot be trained: set "
                "model.quantization=null, or tuning=lora"
            )
        networks = networks_of(transformer)
        if len(networks) > 1:
            raise UserError(
                f"tuning=full trains one network, and the pipeline has {len(networks)}; set "
                "tuning=lora"
            )

    def attach(self, transformer: nn.Module, seed: int) -> AllWeights:
        """Make every weight trainable and keep a copy of it; nothing is drawn, so `seed` has no
        effect.

        Raises UserError as `check_layers`, and for weights that are not float32, whatever the
        configuration says they are.
        """
        self.check_layers(transformer)
        # The weights themselves are asked: `dtype` is only what the configuration says.
        dtypes = {str(weight.dtype) for weight in transformer.parameters()}
        if dtypes != {"torch.float32"}:
            others = ", ".join(sorted(dtypes - {"torch.float32"}))
            raise UserError(f"tuning=full with weights in {others}; set model.dtype=float32")
        return AllWeights(transformer.requires_grad_(True))


class AllWeights:
    """All weights of a transformer, which count as trained from now on, beside a copy of what they
    are now: the reference.
    """

    folder_name: ClassVar[str] = formats.WHOLE_FOLDER
    reference: dict[str, Tensor] | None

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        self.reference = {
            name: value.detach().clone() for name, value in transformer.named_parameters()
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.transformer.named_parameters())

    def at_reference(self) -> AbstractContextManager[None]:
        """Run the model as it was before training."""
        assert self.reference is not None
        return in_place_of_trained(self.transformer, self.parameters(), self.reference)

    def at_base(self) -> AbstractContextManager[None]:
        """Run the model as it was before training, which is the reference here."""
        return self.at_reference()

    def save(self, pipeline: Any, folder: Path) -> None:
        """Write the whole transformer, for its class's `from_pretrained`."""
        if sharding.is_divided(self.transformer):
            sharding.save(self.transformer, folder)
        else:
            self.transformer.save_pretrained(folder)  # type: ignore[operator]  # by diffusers


def load_files(transformer: nn.Module, paths: Sequence[Path]) -> None:
    """Load what some files hold together: a checkpoint's average of all weights, or a whole
    transformer as `save` exports it.

    Raises UserError unless they hold exactly the transformer's weights.
    """
    constants = dict(transformer.named_buffers())  # exported with the weights, and never trained
    weights: dict[str, Tensor] = {}
    for path in paths:
        weights |= load_file(path)
    trained = {name: value for name, value in weights.items() if name not in constants}
    load(dict(transformer.named_parameters()), trained, remedy=OTHER_MODEL)


def attach_whole(transformer: nn.Module, folder: Path) -> AllWeights:
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
    # The reference is copied first, while the weights are still the base's.
    tuning = AllWeights(transformer)
    try:
        load_files(transformer, files)
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the weights do not fit this {type(transformer).__name__} ({error})"
        ) from error
    if bad := first_not_finite(tuning.parameters()):
        raise UserError(
            f"{folder}: its weight {bad!r} holds NaN or infinity; export an earlier checkpoint"
        )
    return tuning


def check_whole(transformer: nn.Module, paths: Sequence[Path]) -> None:
    """Raise UserError unless some files together hold every weight of the transformer; only their
    heads are read.
    """
    constants = dict(transformer.named_buffers())
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    # A slice knows its shape without reading a number.
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); export it again") from error
    trained = {name: shape for name, shape in shapes.items() if name not in constants}
    try:
        check_shapes(dict(transformer.named_parameters()), trained, remedy=OTHER_MODEL)
    except UserError as error:
        raise UserError(
            f"{paths[0]}: the weights do not fit this {type(transformer).__name__} ({error})"
        ) from error
