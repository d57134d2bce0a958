"""Optional packages and weights of scorers, with errors that name the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.models.weights import DTYPES, fault, first_not_finite


def require(module: str, extra: str) -> Any:
    """Import an optional package. Raises UserError naming the extra that brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"this reward needs the package {error.name!r}; install it with: pip install "
            f"'flowrl[{extra}]'"
        ) from error


def dtype_of(name: str) -> torch.dtype:
    """A dtype by its name. Raises UserError for others than float32, bfloat16 and float16."""
    if name not in DTYPES:
        raise UserError(f"reward.dtype={name!r} must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_pretrained(kind: Any, source: str, key: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a local folder or hub id.

    Raises UserError naming the configuration key `key`, also for a network with weights that are
    missing, which transformers would draw at random, or are no numbers.
    """
    path = Path(source).expanduser()
    place = str(path) if path.is_dir() else source
    try:
        if not _is_network(kind):
            return kind.from_pretrained(place, **options)
        with _without_report():
            network, info = kind.from_pretrained(
                place, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (
        Exception
    ) as error:  # a dozen types, by what is wrong with the folder, the hub or the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"reward.{key}={source}: cannot load {kind.__name__} ({reason}); give a local folder "
            "or a hub id ORG/NAME"
        ) from error
    if problem := fault(network, info):
        raise UserError(
            f"reward.{key}={source}: {kind.__name__}: {problem}; restore the folder or download it "
            "again"
        )
    return network


def _is_network(kind: Any) -> bool:
    """Not a tokenizer or processor, which have no weights."""
    return isinstance(kind, type) and issubclass(kind, nn.Module)


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of weights that do not fit, of which `fault` makes one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load_weights(source: str, key: str) -> Mapping[str, Tensor]:
    """The state dict in a file: a local path, or ORG/NAME/FILE on the hub. Raises UserError naming
    `key`.

    Nothing but tensors is unpickled. A dict below `state_dict`, where training scripts put it, is
    taken out.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        path = Path(_download(source, key))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # zip, pickle, safetensors and value errors alike mean a file that is no weights
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"reward.{key}={source}: no readable weights ({reason}); download the file again"
        ) from error
    weights = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(weights, Mapping):
        raise UserError(
            f"reward.{key}={source}: holds a {type(weights).__name__} and no weights by name"
        )
    if name := first_not_finite(
        {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    ):
        raise UserError(
            f"reward.{key}={source}: its weight {name!r} holds NaN or infinity; download the file "
            "again"
        )
    return weights


def _download(source: str, key: str) -> str:
    from huggingface_hub import hf_hub_download

    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) < 3:
        raise UserError(
            f"reward.{key}={source}: no such file; give a path, or ORG/NAME/FILE on the hub"
        )
    try:
        return hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]))
    except Exception as error:  # no network, no such repository, no such file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"reward.{key}={source}: cannot download it ({reason}); give a local path"
        ) from error
