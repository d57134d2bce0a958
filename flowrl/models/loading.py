"""A diffusers pipeline is loaded here, whole or in parts, with errors that name the path and the
remedy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flowrl.errors import UserError, first_line
from flowrl.models.architectures import pipeline_on_meta
from flowrl.models.components import AGAIN, read_json, variants_of
from flowrl.models.components import load as load_component
from flowrl.models.experts import NETWORK
from flowrl.models.hub import UNREACHABLE, print_once
from flowrl.models.quantization import quantize
from flowrl.models.weights import DTYPES
from flowrl.values.bounds import Dtype, Quantization
from flowrl.values.check import check_fields

EMBEDDED = "embedded:"
"""Prefix of `model.pretrained` for a pipeline shipped inside the package."""

META = "meta:"
"""Prefix of `model.pretrained` for a released model or a folder without its weights: for plans."""

INDEX = "model_index.json"
"""The file of a pipeline's folder that names its class, its components and their classes."""


@dataclass(frozen=True, slots=True)
class Source:
    """The origin of a pipeline: its class in diffusers, a local folder or hub id, a revision, and
    one dtype, but for the autoencoder where `decode_dtype` gives it another; with `quantization`
    the transformer's blocks are held in fewer bits.

    A token for gated repositories is taken as the hub library takes it: from `hf auth login` or
    `HF_TOKEN`.
    """

    kind: type[Any]
    pretrained: str
    revision: str | None
    dtype: Dtype
    decode_dtype: Dtype | None = None
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        check_fields(self, "model")

    def load(self, **components: Any) -> Any:
        """Load the pipeline with some of its components replaced; None leaves one out and unread.

        Raises UserError, in one line, for another kind of pipeline and for missing or unreadable
        weights.
        """
        dtype = DTYPES[self.dtype]
        if self.pretrained.startswith(META):
            name = self.pretrained.removeprefix(META)
            pipeline: Any = pipeline_on_meta(self.kind, name, dtype)
            pipeline.vae.to(DTYPES[self._dtype_of("vae")])
            if self.quantization is not None:
                quantize(pipeline.transformer, self.quantization)
            return pipeline
        source = resolve(self.pretrained)
        index = self.index()
        actual = index.get("_class_name")
        if actual != self.kind.__name__:
            raise UserError(
                f"model.pretrained={self.pretrained} holds a {actual}, but model._target_ takes a "
                f"{self.kind.__name__}; choose the `model` option of its family"
            )
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        try:
            folder = Path(source)
            if not folder.is_dir():
                folder = self._download(source, components)
            entries = self._entries(index, components)
            # Components are loaded one by one, as the pipeline would load them itself, so that an
            # error names the component and weights that are missing are seen.
            loaded: dict[str, Any] = {}
            for name, entry in entries.items():
                loaded[name] = load_component(folder, name, entry, DTYPES[self._dtype_of(name)])
                # At once, so that of several networks one alone is ever whole.
                if self.quantization is not None and NETWORK.fullmatch(name):
                    quantize(loaded[name], self.quantization)
            pipeline = self.kind.from_pretrained(folder, **components, **loaded)
        except UserError as error:
            raise UserError(f"model.pretrained={self.pretrained}: {error}") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"model.pretrained={self.pretrained}: cannot load {self.kind.__name__} "
                f"({first_line(error)})"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _dtype_of(self, component: str) -> Dtype:
        """Return the dtype that a component is loaded in."""
        return self.decode_dtype or self.dtype if component == "vae" else self.dtype

    def index(self) -> dict[str, Any]:
        """Read the pipeline's index. Raises UserError where it is not there, not readable or not to
        be had.
        """
        return read_index(resolve(self.pretrained), self.pretrained, self.revision)

    def has(self, name: str) -> bool:
        """Tell, without loading any, whether the pipeline has this component, which its index may
        leave out.
        """
        if self.pretrained.startswith(META):
            return True
        return entry_of(self.index(), name) is not None

    def _entries(
        self, index: Mapping[str, Any], replaced: Mapping[str, Any]
    ) -> dict[str, tuple[str, str]]:
        """Return library and class of each component to load. Raises UserError where one that the
        pipeline needs is null.
        """
        entries = {}
        for name in self.kind._get_signature_keys(self.kind)[0]:
            entry = entry_of(index, name)
            if name in replaced:
                continue
            if entry is not None:
                entries[name] = entry
            elif name not in self.kind._optional_components:
                raise UserError(f"its {INDEX} has no {name}, which the model needs; {AGAIN}")
        return entries

    def _download(self, source: str, replaced: Mapping[str, Any]) -> Path:
        """Return the folder of a hub id's files, without those of replaced components; of networks,
        the only variant if there is but one.

        Raises what the hub's library raises.
        """
        get = partial(
            self.kind.download,
            source,
            revision=self.revision,
            use_safetensors=True,
            **replaced,
        )
        folder = Path(get())
        index = self.index()
        places = [folder / name for name in self._entries(index, replaced)]
        networks = [place for place in places if (place / "config.json").is_file()]
        if all(any(place.glob("*.safetensors")) for place in networks):
            return folder
        # diffusers leaves out weights of a variant that it was not asked for, without a word.
        paths = HfApi().list_repo_files(source, revision=self.revision)
        variants = variants_of(path.rpartition("/")[2] for path in paths)
        named = sorted(variant for variant in variants if variant is not None)
        return Path(get(variant=named[0])) if named else folder

    def identity(self, components: Sequence[str]) -> str:
        """Return a text that changes with the weights of some components: for keys of what they
        computed.
        """
        if self.pretrained.startswith(META):
            return self.pretrained
        source = resolve(self.pretrained)
        if not os.path.isdir(source):
            # The index lies in a folder named after the commit that the revision stands for.
            commit = Path(_fetch_index(source, self.revision)).parent.name
            return f"{source}@{commit} {self.dtype}"
        entries: list[Path] = []
        for name in components:
            entries += Path(source, name).glob("*")
        # Sizes and times rather than digests: reading gigabytes at every start would take minutes.
        stamps = " ".join(_stamp(path) for path in sorted(entries) if path.is_file())
        return f"{source} {stamps} {self.dtype}"


def _stamp(path: Path) -> str:
    """Return a file's name, size and time, which change with its content."""
    stat = path.stat()
    return f"{path.parent.name}/{path.name}:{stat.st_size}:{stat.st_mtime_ns}"


def image_components(pipeline: Any) -> dict[str, Any]:
    """Return the components of a pipeline that text encoders join, when they are loaded again."""
    return {name: pipeline.components[name] for name in ("transformer", "vae", "scheduler")}


def autoencoder(pipeline: Any, channels_last: bool) -> Any:
    """Return a pipeline's autoencoder for decoding: frozen, and with the weights of its
    convolutions in the layout asked for.
    """
    vae = pipeline.vae.requires_grad_(False).eval()
    if channels_last:
        # Video's weights, of one dimension more, stay as they are.
        vae.to(memory_format=torch.channels_last)
    return vae


def resolve(pretrained: str) -> str:
    """Return a local folder or hub id. Raises UserError where a local path is meant and missing."""
    if pretrained.startswith(EMBEDDED):
        name = pretrained.removeprefix(EMBEDDED)
        return str(files("flowrl.shapes").joinpath("assets", name))
    path = Path(pretrained).expanduser()
    if path.is_dir():
        if not (path / INDEX).is_file():
            raise UserError(
                f"model.pretrained={pretrained}: no {INDEX}; give a folder in diffusers layout"
            )
        return str(path)
    # ORG of ORG/NAME is rarely a folder here.
    is_marked = pretrained.startswith((".", "~"))
    if is_marked or pretrained.count("/") != 1 or path.parent.is_dir():
        raise UserError(
            f"model.pretrained={pretrained}: no such folder; give a diffusers folder or a hub id "
            "ORG/NAME"
        )
    return pretrained


def read_index(source: str, pretrained: str, revision: str | None) -> dict[str, Any]:
    """Read a pipeline's index, from a folder or the hub. Raises UserError saying what stands in the
    way of a hub id.
    """
    if os.path.isdir(source):
        return read_json(Path(source, INDEX))
    try:
        return read_json(Path(_fetch_index(source, revision)))
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        reason = _hub_reason(error, source, revision)
        raise UserError(f"model.pretrained={pretrained}: {reason}") from error


def _hub_reason(error: Exception, source: str, revision: str | None) -> str:
    """Say what stands in the way of a hub id, and the remedy; the more special errors come first,
    since some are kinds of others.
    """
    match error:
        case GatedRepoError():
            return (
                "gated, and your token does not open it: accept the licence at "
                f"https://huggingface.co/{source}, then run `hf auth login` or set HF_TOKEN"
            )
        case RepositoryNotFoundError():
            return (
                "no such repository on the hub, or a private one: check the name, or set HF_TOKEN"
            )
        case RevisionNotFoundError():
            return f"model.revision={revision} does not exist; give a branch, tag or commit"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return UNREACHABLE
        case EntryNotFoundError():
            return f"no {INDEX} in the repository; give one in diffusers layout"
    return f"the hub refused ({first_line(error)})"


def _fetch_index(source: str, revision: str | None) -> str:
    """Return the path of a hub id's index in the local cache, where it is put if it is not there.

    Raises what the hub's library raises.
    """
    print_once()
    return str(hf_hub_download(source, INDEX, revision=revision))


def entry_of(index: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """Return library and class of a component; None where the index has none, which it says by
    nulls.
    """
    # A component that was left out is written as [null, null], and other keys are no lists.
    match index.get(name):
        case [str(library), str(kind)]:
            return library, kind
    return None
