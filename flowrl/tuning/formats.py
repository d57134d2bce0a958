"""LoRA files are read here, as diffusers, peft and ComfyUI write them, and checked against a
transformer.

There is one reader: training, evaluation, pictures and export all take their LoRA from `read`. A
file that names layers which the transformer does not have is refused: loaders that skip them
silently draw with the base model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models.experts import networks_of
from flowrl.runs import checkpoint
from flowrl.runs.base_model import named_in_run
from flowrl.runs.command_line import tool_command
from flowrl.runs.files import CHECKPOINTS, CONFIG, read_yaml
from flowrl.tuning import layer_names, networks
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.metadata import notes_of, only_notes

SUFFIX = ".safetensors"

FOLDER = "lora"
"""The folder that a run exports its LoRA to."""
WHOLE_FOLDER = "transformer"
"""The folder that a run exports the whole transformer to, which full fine-tuning trains."""
START = "start"
"""The folder where a run keeps a copy of the LoRA that it began from."""

WHOLE = "diffusion_pytorch_model"
"""The beginning of the names of a whole transformer's files."""

AVERAGE = "ema.safetensors"
"""The file of a checkpoint's average of the trained weights."""


def whole_files(folder: Path) -> list[Path]:
    """Return the files of a whole transformer in a folder, if that is what it holds."""
    return sorted(folder.glob(f"{WHOLE}*{SUFFIX}"))


def find(source: Path) -> Path:
    """Find the file of a LoRA: itself, the one in a folder, or of a run its export, else the
    average of its newest whole checkpoint.

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
        file = _only_file(folder, source)
        if file is not None:
            return file
    if newest := checkpoint.find_newest(source / CHECKPOINTS, [Path(AVERAGE).stem]):
        return newest / AVERAGE
    raise UserError(
        f"{source}: neither a LoRA nor a checkpoint there; give a LoRA file, or a run's folder"
    )


def _only_file(folder: Path, source: Path) -> Path | None:
    """Return the only LoRA file of a folder, None where it has none; those of further networks
    stand beside it. Raises UserError where it holds several, or a whole transformer, and then names
    the `source` that was asked for.

    A file under one of the programs' usual names comes before all others beside it.
    """
    if whole_files(folder) or whole_files(folder / WHOLE_FOLDER):
        raise UserError(
            f"{source} holds a whole transformer, as full fine-tuning trains it, and no LoRA"
        )
    usual = [folder / name for name in layer_names.NAMES.values()]
    files = [file for file in usual if file.is_file()]
    if not files:
        places = sorted(folder.glob(f"*{SUFFIX}"))
        files = [place for place in places if not networks.is_companion(place)]
    if len(files) > 1:
        raise UserError(f"{folder}: {len(files)} LoRA files in this folder; give one by name")
    return files[0] if files else None


def read(path: Path) -> LoRAFile:
    """Read the LoRA of a file or folder, as `find` takes it, in float32; of a pipeline with several
    networks also what lies beside it in files of its other networks, and all layers' names then
    begin with their network's.

    Alpha is each layer's own tensor, or what peft's configuration says in the file or beside it, or
    of a checkpoint what its run says; a file that was written for others and tells none means the
    rank. Raises UserError, naming the file and the reason, for all that is not a LoRA of linear
    layers, and where the scale cannot be known.
    """
    file = find(path)
    first = _read_file(file)
    others = {network: _read_file(place) for network, place in networks.companions_of(file).items()}
    return networks.joined(first, others)


def files_of(source: Path) -> list[Path]:
    """Return the files of a LoRA, as `find` finds the first one: one for each network."""
    file = find(source)
    return [file, *networks.companions_of(file).values()]


def _read_file(file: Path) -> LoRAFile:
    """Read one file, as `read` does."""
    tensors, config, notes = _open(file)
    trained = {
        key: tensor for key, tensor in tensors.items() if not layer_names.is_text_encoders(key)
    }
    if tensors and not trained:
        raise UserError(
            f"{file} holds a LoRA of text encoders alone, which are not trained; it has no other "
            "layers"
        )
    # First, since most of what is refused so would fail below too, for a reason that misleads.
    layer_names.refuse_kinds(trained, file)
    layer_names.refuse_settings(config, file)
    contents = _Contents()
    for key, tensor in trained.items():
        contents.add(key, tensor, file)
    # Those of the first of several networks lost its name, as if it were the file's prefix.
    for table in (contents.a, contents.b, contents.alpha):
        networks.name_first(table)
    _check_matrices(contents.a, contents.b, contents.alpha, file)
    # Checkpoints hold an attached adapter's parameters, whose names alone say the adapter's.
    is_checkpoint = contents.adapters != {""}
    alpha = _alphas(contents.a, contents.alpha, config, file, is_checkpoint)
    if is_checkpoint and not notes:
        run = _run_of(file)
        notes = notes_of(named_in_run(_run_config(run), run))
    return LoRAFile(contents.a, contents.b, alpha, len(tensors) - len(trained), notes)


@dataclass(slots=True)
class _Contents:
    """The tensors of a file by layer, as its keys name them, and the names of its adapters."""

    a: dict[str, Tensor] = field(default_factory=dict)
    b: dict[str, Tensor] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)

    def add(self, key: str, tensor: Tensor, file: Path) -> None:
        """Take in one tensor. Raises UserError where it holds no numbers or is no LoRA weight."""
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(
                f"{file}: {key!r} holds values that are not finite numbers; export the LoRA again"
            )
        matrix = layer_names.matrix_of(key)
        alpha_layer = layer_names.alpha_of(key)
        if matrix is not None:
            self._add_matrix(*matrix, tensor, file)
        elif alpha_layer is not None and tensor.numel() == 1:
            self.alpha[alpha_layer] = float(tensor)
        else:
            raise UserError(
                f"{file}: {key!r} is no LoRA weight; give a file of lora_A and lora_B matrices"
            )

    def _add_matrix(
        self, layer: str, matrix: str, adapter: str, tensor: Tensor, file: Path
    ) -> None:
        """Take in one matrix, in float32. Raises UserError where its layer has one already."""
        self.adapters.add(adapter)
        matrices = self.a if matrix == "A" else self.b
        # Two prefixes or two adapters in one file come to the same layer's name.
        if layer in matrices:
            raise UserError(f"{file} holds {layer!r} twice; give a file of one LoRA")
        matrices[layer] = tensor.float()


def _open(file: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Return the tensors of a file, peft's configuration in its metadata or beside it, and its
    notes.
    """
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
    # diffusers puts the component before each key, since a file may hold several components' LoRAs.
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    beside = file.with_name("adapter_config.json")
    if not config and beside.is_file():
        config = _settings(beside.read_bytes(), beside)
    return tensors, config, only_notes(metadata)


def _settings(text: str | bytes, file: Path) -> dict[str, Any]:
    """Read peft's configuration. Raises UserError for what is no JSON object."""
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
        rank_a = a[name].shape[0]  # A is (rank, in)
        rank_b = b[name].shape[1]  # B is (out, rank)
        if rank_a != rank_b or rank_a == 0:
            raise UserError(
                f"{file}: the matrices of {name} have ranks {rank_a} and {rank_b}; they must be "
                "equal and at least 1"
            )


def _alphas(
    a: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    config: Mapping[str, Any],
    file: Path,
    is_checkpoint: bool,
) -> dict[str, float]:
    """Return every layer's alpha. Raises UserError where two places disagree, and where a
    checkpoint's is not known.
    """
    ranks = {name: matrix.shape[0] for name, matrix in a.items()}
    if config.get("lora_alpha") is not None:
        told = {
            name: layer_names.alpha_by_settings(config, name, rank, file)
            for name, rank in ranks.items()
        }
        for name, alpha in alphas.items():
            # A tensor's alpha may have been rounded to float32.
            if not math.isclose(alpha, told[name], rel_tol=1e-6):
                raise UserError(
                    f"{file} tells two alphas of {name}: {alpha:g} in a tensor, {told[name]:g} in "
                    "its configuration; export the LoRA again"
                )
        return told
    if is_checkpoint and not alphas:
        return _alphas_of_run(a, file)
    # By convention alpha is the rank, and the scale 1, where a file tells none.
    return {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}


def _alphas_of_run(a: Mapping[str, Tensor], file: Path) -> dict[str, float]:
    """Return the alphas of a checkpoint's weights: those of the LoRA that its run began from, or
    the configured one.
    """
    run = _run_of(file)
    if (run / START).is_dir():
        start = read(run / START).alpha
        if start.keys() == a.keys():
            return dict(start)
    config = _run_config(run)
    try:
        return dict.fromkeys(a, float(config["lora"]["alpha"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} does not tell its alpha, as checkpoints do not, nor does {run / CONFIG}; "
            f"{_remedy()}"
        ) from error


def _run_of(file: Path) -> Path:
    """Return the run of a checkpoint's file, RUN/checkpoints/NAME/ema.safetensors."""
    return file.parent.parent.parent


def _run_config(run: Path) -> dict[str, Any]:
    """Read a run's configuration, nothing where there is none. Raises UserError for a damaged
    one.
    """
    config = run / CONFIG
    return read_yaml(config, _remedy()) if config.is_file() else {}


def _remedy() -> str:
    return f"{tool_command('export', 'export_lora.py', 'RUN')} exports a run's"


def linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a transformer by name."""
    modules = transformer.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def _check_networks(lora_file: LoRAFile, transformer: nn.Module, path: Path) -> None:
    """Raise UserError where the transformer is several networks and one has no layer in the file,
    which would go untrained.
    """
    names = [prefix.removesuffix(".") for prefix in networks_of(transformer)]
    if len(names) == 1:
        return
    known = set(map(networks.network_of, lora_file.a))
    # The layers of a single network have no network's name.
    if None in known:
        known = {names[0]}
    missing = [name for name in names if name not in known]
    if missing:
        first = find(path)
        beside = first if missing[0] == names[0] else networks.companion_of(first, missing[0])
        raise UserError(
            f"{path} holds no LoRA of {missing[0]}, and the model has {' and '.join(names)}; put "
            f"it beside, as {beside}"
        )


def check(lora_file: LoRAFile, transformer: nn.Module, path: Path) -> None:
    """Raise UserError unless every layer of the file is a linear layer of the transformer, of the
    same shape, and each of several networks has one.
    """
    _check_networks(lora_file, transformer, path)
    linear = linear_layers(transformer)
    # A quantised layer's weight has a shape of its own.
    wanted = {name: (layer.out_features, layer.in_features) for name, layer in linear.items()}
    shapes = {}
    for name, matrix in lora_file.a.items():
        # B A, of B (out, rank) and A (rank, in), has the shape of the layer's weight.
        shapes[name] = (lora_file.b[name].shape[0], matrix.shape[1])
    misfits = [name for name, shape in shapes.items() if wanted.get(name) != shape]
    if misfits:
        kind = type(transformer).__name__
        num_fitting = len(shapes) - len(misfits)
        count = f"only {num_fitting}" if num_fitting else "none"
        raise UserError(
            f"{path}: {count} of its {len(shapes)} layers fit this {kind} (the first that does "
            f"not: {misfits[0]!r}); it is a LoRA of another architecture"
        )
