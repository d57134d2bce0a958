"""LoRA files: reading what diffusers, peft and ComfyUI write, and checking it against a
transformer.

There is one reader: training, evaluation, pictures and export all take their LoRA from `read`. A
file that names layers which the transformer does not have is refused: loaders that skip them
silently draw with the base model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.runs import checkpoint
from flowrl.runs.files import CHECKPOINTS, CONFIG, read_yaml
from flowrl.tuning import layer_names

SUFFIX = ".safetensors"

FOLDER = "lora"
WHOLE_FOLDER = "transformer"
START = "start"
"""Where a run exports to: its LoRA, or the whole transformer that full fine-tuning trains; and
where it keeps a copy of the LoRA that it began from.
"""

WHOLE = "diffusion_pytorch_model"
"""How the files of a whole transformer begin."""

AVERAGE = "ema.safetensors"
"""A checkpoint's average of the trained weights."""


@dataclass(frozen=True, slots=True)
class LoRAFile:
    """Per layer the matrices A (rank, in) and B (out, rank) and alpha: the layer adds alpha / rank
    B A x.

    `num_passed_over` counts the file's tensors that belong to text encoders.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    alpha: Mapping[str, float]
    num_passed_over: int = 0

    @property
    def ranks(self) -> dict[str, int]:
        """Each layer's rank."""
        return {name: matrix.shape[0] for name, matrix in self.a.items()}

    def describe(self) -> str:
        """Layers, ranks and alphas in words, and what was passed over."""
        ranks = sorted(set(self.ranks.values()))
        alphas = sorted(set(self.alpha.values()))
        text = f"{len(self.a)} layers, rank {_listed(ranks)}, alpha {_listed(alphas)}"
        passed = (
            f"; {self.num_passed_over} tensors of text encoders are passed over, since those are "
            "not trained"
        )
        return text + (passed if self.num_passed_over else "")


def _listed(values: list[Any]) -> str:
    return " and ".join(f"{value:g}" for value in values)


def whole_files(folder: Path) -> list[Path]:
    """The files of a whole transformer in a folder, if that is what it holds."""
    return sorted(folder.glob(f"{WHOLE}*{SUFFIX}"))


def find(source: Path) -> Path:
    """The file of a LoRA: itself, the one in a folder, or of a run its export, else the average of
    its newest whole checkpoint.

    Raises UserError where there is none, several, or the weights of a whole transformer.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UserError(
            f"{source}: no such file or folder; give a LoRA file, a folder with one, or a run's "
            "folder"
        )
    for folder in (source / FOLDER, source):
        if whole_files(folder) or whole_files(folder / WHOLE_FOLDER):
            raise UserError(
                f"{source} holds a whole transformer, as full fine-tuning trains it, and no LoRA"
            )
        known = [folder / name for name in layer_names.NAMES.values() if (folder / name).is_file()]
        files = known or sorted(folder.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            raise UserError(f"{folder}: {len(files)} LoRA files in this folder; give one by name")
        if files:
            return files[0]
    if newest := checkpoint.find_newest(source / CHECKPOINTS, [Path(AVERAGE).stem]):
        return newest / AVERAGE
    raise UserError(
        f"{source}: neither a LoRA nor a checkpoint there; give a LoRA file, or a run's folder"
    )


def read(path: Path) -> LoRAFile:
    """The LoRA of a file or folder, as `find` takes it, in float32.

    Alpha is each layer's own tensor, or what peft's configuration says in the file or beside it, or
    of a checkpoint what its run says; a file that was written for others and tells none means the
    rank. Raises UserError, naming the file and the reason, for all that is not a LoRA of linear
    layers, and where the scale cannot be known.
    """
    file = find(path)
    tensors, config = _open(file)
    kept = {key: tensor for key, tensor in tensors.items() if not layer_names.is_text_encoders(key)}
    if tensors and not kept:
        raise UserError(
            f"{file} holds a LoRA of text encoders alone, which are not trained; it has no other "
            "layers"
        )
    layer_names.refuse_kinds(kept, file)
    layer_names.refuse_settings(config, file)
    matrices: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    alphas: dict[str, float] = {}
    adapters: set[str] = set()
    for key, tensor in kept.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(
                f"{file}: {key!r} holds values that are not finite numbers; export the LoRA again"
            )
        if parsed := layer_names.matrix_of(key):
            layer, matrix, adapter = parsed
            adapters.add(adapter)
            if layer in matrices[matrix]:
                raise UserError(f"{file} holds {layer!r} twice; give a file of one LoRA")
            matrices[matrix][layer] = tensor.float()
        elif (alpha_layer := layer_names.alpha_of(key)) and tensor.numel() == 1:
            alphas[alpha_layer] = float(tensor)
        else:
            raise UserError(
                f"{file}: {key!r} is no LoRA weight; give a file of lora_A and lora_B matrices"
            )
    _check_matrices(matrices["A"], matrices["B"], alphas, file)
    scale = _alphas(matrices["A"], alphas, config, file, is_checkpoint=adapters != {""})
    return LoRAFile(matrices["A"], matrices["B"], scale, len(tensors) - len(kept))


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and peft's configuration in its metadata or beside it."""
    if file.suffix != SUFFIX:
        raise UserError(
            f"{file}: a LoRA is read from {SUFFIX} files alone, since others can run code; convert "
            "it"
        )
    if file.name.startswith(WHOLE):
        raise UserError(
            f"{file} holds a whole transformer, as full fine-tuning trains it, and no LoRA"
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); export it again") from error
    config = _settings(metadata.get(layer_names.METADATA, "{}"), file)
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    beside = file.with_name("adapter_config.json")
    if not config and beside.is_file():
        config = _settings(beside.read_bytes(), beside)
    return tensors, config


def _settings(text: str | bytes, file: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:  # of JSON, and of bytes that are no text
        raise UserError(
            f"{file}: its LoRA configuration cannot be read ({error}); export the LoRA again"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: its LoRA configuration must be an object; export the LoRA again")
    return config


def _check_matrices(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], alphas: Mapping[str, float], file: Path
) -> None:
    """Raise UserError unless every layer has two matrices of one rank."""
    if not a and not b:
        raise UserError(f"{file}: no LoRA weights in it")
    for name in sorted(a.keys() | b.keys() | alphas.keys()):
        if name not in a or name not in b:
            raise UserError(f"{file}: {name} has only one of its two matrices")
        if a[name].ndim != 2 or b[name].ndim != 2:
            raise UserError(
                f"{file}: {name} is a convolution's; only linear layers are trained here"
            )
        if not 0 < a[name].shape[0] == b[name].shape[1]:
            raise UserError(
                f"{file}: the matrices of {name} have ranks {a[name].shape[0]} and "
                f"{b[name].shape[1]}; they must be "
                "equal and at least 1"
            )


def _alphas(
    a: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    config: Mapping[str, Any],
    file: Path,
    is_checkpoint: bool,
) -> dict[str, float]:
    """Every layer's alpha. Raises UserError where two places disagree, and where a checkpoint's is
    not known.
    """
    if config.get("lora_alpha") is not None:
        told = {
            name: layer_names.alpha_by_settings(config, name, a[name].shape[0], file) for name in a
        }
        for name, alpha in alphas.items():
            if not math.isclose(alpha, told[name], rel_tol=1e-6):
                raise UserError(
                    f"{file} tells two alphas of {name}: {alpha:g} in a tensor, {told[name]:g} in "
                    "its configuration; "
                    "export the LoRA again"
                )
        return told
    if is_checkpoint and not alphas:
        return _alphas_of_run(a, file)
    return {name: alphas.get(name, float(matrix.shape[0])) for name, matrix in a.items()}


def _alphas_of_run(a: Mapping[str, Tensor], file: Path) -> dict[str, float]:
    """The alphas of a checkpoint's weights: those of the LoRA that its run began from, or the
    configured one.
    """
    run = file.parent.parent.parent
    if (run / START).is_dir():
        start = read(run / START).alpha
        if start.keys() == a.keys():
            return dict(start)
    config = run / CONFIG
    remedy = "python scripts/export_lora.py RUN exports a run's"
    try:
        return dict.fromkeys(
            a, float((read_yaml(config, remedy) if config.is_file() else {})["lora"]["alpha"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} does not tell its alpha, as checkpoints do not, nor does {config}; {remedy}"
        ) from error


def check(given: LoRAFile, transformer: nn.Module, path: Path) -> None:
    """Raise UserError unless every layer of the file is a linear layer of the transformer, of the
    same shape.
    """
    linear = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }
    shapes = {name: (given.b[name].shape[0], given.a[name].shape[1]) for name in given.a}
    odd = [
        name
        for name, shape in shapes.items()
        if name not in linear or tuple(linear[name].weight.shape) != shape
    ]
    if odd:
        kind = type(transformer).__name__
        many = "none" if len(odd) == len(shapes) else f"only {len(shapes) - len(odd)}"
        raise UserError(
            f"{path}: {many} of its {len(shapes)} layers fit this {kind} (the first that does not: "
            f"{odd[0]!r}); it is "
            "a LoRA of another architecture"
        )
