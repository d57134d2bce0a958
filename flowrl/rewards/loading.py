"""Optional packages and weights of scorers are loaded here, with errors that name the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.errors import UserError, first_line
from flowrl.models.hub import UNREACHABLE, is_unreachable, print_once
from flowrl.models.weights import fault, first_not_finite


def require(module: str, extra: str) -> Any:
    """Import an optional package and return its module. Raises UserError naming the extra that
    brings it, where it or a package that it needs is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"this reward needs the package {error.name!r}; install it with: pip install "
            f"'flowrl-lightning[{extra}]'"
        ) from error


def load_pretrained(kind: Any, source: str, key: str, **options: Any) -> Any:
    """Call `kind.from_pretrained` on a local folder or hub id.

    Raises UserError naming the configuration key `key`, also for a network with weights that are
    missing, which transformers would draw at random, or are no numbers.
    """
    path = Path(source).expanduser()
    place = str(path) if path.is_dir() else source
    print_once()
    try:
        if not _is_network(kind):
            return kind.from_pretrained(place, **options)
        with _without_report():
            network, info = kind.from_pretrained(
                place, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    # A dozen types, by what is wrong with the folder, the hub or the network.
    except Exception as error:
        if not path.exists() and is_unreachable(error):
            raise UserError(f"reward.{key}={source}: {UNREACHABLE}") from error
        raise UserError(
            f"reward.{key}={source}: cannot load {kind.__name__} ({first_line(error)}); give a "
            "local folder or a hub id ORG/NAME"
        ) from error
    if problem := fault(network, info):
        raise UserError(
            f"reward.{key}={source}: {kind.__name__}: {problem}; restore the folder or download it "
            "again"
        )
    return network


def _is_network(kind: Any) -> bool:
    """Tell networks from tokenizers and processors, which have no weights."""
    return isinstance(kind, type) and issubclass(kind, nn.Module)


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of weights that do not fit, of which `fault` makes one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def load_weights(source: str, key: str) -> Mapping[str, Tensor]:
    """Read the state dict in a file: a local path, or ORG/NAME/FILE on the hub. Raises UserError
    naming `key`.

    Nothing but tensors is unpickled. A dict below `state_dict`, where training scripts put it, is
    taken out.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        path = Path(_download(source, key))
    try:
        state = _read_tensors(path)
    # Zip, pickle, safetensors and value errors alike mean a file that is no weights.
    except Exception as error:
        raise UserError(
            f"reward.{key}={source}: no readable weights ({first_line(error)}); download the file "
            "again"
        ) from error
    weights = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(weights, Mapping):
        raise UserError(
            f"reward.{key}={source}: holds a {type(weights).__name__} and no weights by name"
        )
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if name := first_not_finite(tensors):
        raise UserError(
            f"reward.{key}={source}: its weight {name!r} holds NaN or infinity; download the file "
            "again"
        )
    return weights


def _read_tensors(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _download(source: str, key: str) -> str:
    """Download ORG/NAME/FILE from the hub, whose file may lie in folders, and return its path."""
    from huggingface_hub import hf_hub_download

    names = source.split("/")
    is_path = source.startswith((".", "/", "~"))
    if is_path or len(names) < 3:
        raise UserError(
            f"reward.{key}={source}: no such file; give a path, or ORG/NAME/FILE on the hub"
        )
    print_once()
    repository = "/".join(names[:2])
    file = "/".join(names[2:])
    try:
        return hf_hub_download(repository, file)
    except Exception as error:  # no such repository, no such file
        if is_unreachable(error):
            raise UserError(f"reward.{key}={source}: {UNREACHABLE}") from error
        raise UserError(
            f"reward.{key}={source}: cannot download it ({first_line(error)}); give a local path"
        ) from error
