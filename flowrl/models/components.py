"""One component of a pipeline's folder is loaded here: its weights are looked for, read, and then
checked to be all there.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from flowrl.errors import UserError, first_line
from flowrl.models.text import quiet
from flowrl.models.weights import fault, has_adapter

log = logging.getLogger(__name__)

LIBRARIES = ("diffusers", "transformers")
_SHARD = r"(?:-\d+-of-\d+)?"
WEIGHTS = re.compile(rf"(?:model|diffusion_pytorch_model){_SHARD}(?:\.(\w+))?{_SHARD}\.safetensors")
"""A weights file's name; its group is the variant, as in `model.fp16.safetensors`. Releases write
the number of a shard before the variant or after it.
"""

AGAIN = "restore the folder or download it again"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises UserError naming the file where it is missing, cannot
    be read as JSON by diffusers, or holds something else.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {AGAIN}") from error
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(
            f"{path} begins with a byte-order mark, which diffusers does not read; save it as "
            "plain UTF-8"
        )
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UserError(
            f"{path} is cut or damaged ({error}); replace this file by the published one"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__} and no JSON object; replace it by the "
            "published one"
        )
    return content


def load(folder: Path, name: str, entry: Sequence[str], dtype: torch.dtype) -> Any:
    """Load the component `name` of a pipeline's folder, of the class that its entry of the index
    says, `dtype` if a network.

    Raises UserError naming the component, what is wrong with its files, and the remedy.
    """
    place = folder / name
    kind = _class_of(name, entry)
    if not place.is_dir():
        raise UserError(f"{name}: no folder {place}; {AGAIN}")
    if issubclass(kind, nn.Module):
        return _network(place, name, kind, dtype)
    _check_vocabulary(place, name, kind)
    try:
        return kind.from_pretrained(place)
    except Exception as error:  # of any type, by what is wrong with the folder
        reason = first_line(error)
        raise UserError(f"{name}: {place} holds no {kind.__name__} ({reason}); {AGAIN}") from error


def _class_of(name: str, entry: Sequence[str]) -> type[Any]:
    """Return the class of a component. Raises UserError where the libraries have none of its
    name.
    """
    library, class_name = entry
    kind: Any = None
    version = repr(library)
    # Any other library that an index names would be code to import on its word.
    if library in LIBRARIES:
        module = import_module(library)
        kind = getattr(module, class_name, None)
        version = f"{library} {module.__version__}"
    elif hasattr(diffusers.pipelines, library):
        # A pipeline's own parts are named by the module of diffusers that they stand in.
        kind = getattr(getattr(diffusers.pipelines, library), class_name, None)
        version = f"diffusers {diffusers.__version__}"
    if not isinstance(kind, type):
        raise UserError(
            f"{name}: model_index.json asks for {library}.{class_name}, which {version} does not "
            "have; give a pipeline whose classes are diffusers' and transformers', or update the "
            "library"
        )
    return kind


def _network(place: Path, name: str, kind: type[Any], dtype: torch.dtype) -> nn.Module:
    """Load a network. Raises UserError where a weight is missing, of another shape or not a number,
    and in a network of diffusers also where one has no place.
    """
    # The libraries' own errors for a config.json that is not there or cut are long and lead astray.
    read_json(place / "config.json")
    is_transformers = issubclass(kind, transformers.PreTrainedModel)
    # As the pipeline itself loads them, but that other shapes are counted, not raised, where the
    # library can.
    options: dict[str, Any] = {"torch_dtype": dtype}
    if is_transformers:
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    variant = variant_of(place, name)
    try:
        with quiet():
            network, info = kind.from_pretrained(
                place,
                variant=variant,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # of any type, by what is wrong with the folder
        # The most exact reason that there is: which file, else which weight, else what was said.
        reason = _culprit(place) or _shape_reason(error) or first_line(error)
        raise UserError(f"{name}: cannot load its {kind.__name__} ({reason}); {AGAIN}") from error
    if problem := fault(network, info):
        raise UserError(f"{name}: {problem}; {_remedy(place, info)}")
    _look_at_surplus(name, sorted(info["unexpected_keys"]), is_transformers)
    assert isinstance(network, nn.Module)
    return network


def _look_at_surplus(name: str, surplus: Sequence[str], is_transformers: bool) -> None:
    """Warn of weights without a place in a network of transformers, and refuse others: text
    encoders are often released with the weights of a head or a decoder that nothing here uses.
    """
    if not surplus:
        return
    text = (
        f"weights without a place in the network of its config.json: {len(surplus)}, the first "
        f"{surplus[0]!r}"
    )
    if not is_transformers:
        raise UserError(f"{name}: {text}; {AGAIN}, config.json and weights together")
    log.warning("%s: %s; they are left out", name, text)


def _remedy(place: Path, info: Mapping[str, Any]) -> str:
    """Say what to do about a network's faulty weights."""
    if not has_adapter(info):
        return f"restore {place} or download it again"
    return (
        "call fuse_lora() and then unload_lora_weights() of the pipeline before its "
        "save_pretrained(), or give the base model here and the LoRA by lora.start or --lora"
    )


def variant_of(place: Path, name: str) -> str | None:
    """Return the variant to load: None for weights under their plain names, which come first, else
    the only one there is.

    Raises UserError where there are several variants, only pickled weights, or none.
    """
    names = sorted(path.name for path in place.iterdir())
    variants = variants_of(names)
    if None in variants:
        return None
    if len(variants) > 1:
        several = ", ".join(sorted(map(str, variants)))
        raise UserError(
            f"{name}: {place} holds weights of several variants ({several}); keep one of them there"
        )
    if variants:
        variant = str(variants.pop())
        log.warning(
            "%s: only weights of the variant %s are there, so they are taken", name, variant
        )
        return variant
    pickled = [file for file in names if file.endswith((".bin", ".pt", ".ckpt"))]
    if pickled:
        raise UserError(
            f"{name}: only pickled weights there ({pickled[0]}), which can run code while they "
            "load; convert them once, if you trust them, by DiffusionPipeline.from_pretrained(OLD, "
            "use_safetensors=False).save_pretrained(NEW), and set model.pretrained=NEW"
        )
    raise UserError(f"{name}: no weights in {place}; {AGAIN}")


def variants_of(names: Iterable[str]) -> set[str | None]:
    """Collect the variants of the weights files among some names; None stands for plain names."""
    matches = map(WEIGHTS.fullmatch, names)
    return {match[1] for match in matches if match}


def _check_vocabulary(place: Path, name: str, kind: type[Any]) -> None:
    """Raise UserError for a tokenizer without its vocabulary, in whose place transformers puts an
    empty one.
    """
    names: dict[str, str] = getattr(kind, "vocab_files_names", {})
    # `tokenizer.json` alone holds all of a tokenizer; the older files do so together.
    whole = names.get("tokenizer_file")
    if whole is not None and (place / whole).is_file():
        return
    apart = [file for role, file in names.items() if role != "tokenizer_file"]
    # A class that names no other file cannot do without the whole one.
    needed = apart or list(names.values())
    absent = [file for file in needed if not (place / file).is_file()]
    if absent:
        raise UserError(
            f"{name}: no vocabulary in {place}, which lacks {', '.join(absent)}; {AGAIN}"
        )


def _shape_reason(error: Exception) -> str | None:
    """Name the weight that has another shape, from diffusers' message, which is several sentences
    long.
    """
    # A shape, as torch.Size([2, 3]) or plainly as (2, 3).
    numbers = r"(?:torch\.Size)?[(\[]+([\d, ]+)[)\]]+"
    match = re.search(rf"because (\S+) expected shape {numbers}, but got {numbers}", str(error))
    if match is None:
        return None
    name, wanted, shape = match.groups()
    return f"weight {name!r} has shape ({shape}), not the ({wanted}) of its config.json"


def _culprit(place: Path) -> str | None:
    """Name the first weights file of a folder that safetensors cannot open."""
    for path in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"corrupt weights file {path}: {error}"
    return None
