"""Prompt embeddings are computed once for all prompts of a run, then looked up: in memory, or in a
folder.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import textwrap
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowrl.errors import UserError, first_line
from flowrl.images.pictures import read_upright
from flowrl.models.conditioning import join, repeated, split
from flowrl.models.pictured import check_pictures
from flowrl.models.protocol import EditModel, TextModel
from flowrl.parallel.launcher import rank
from flowrl.runs.files import grant_usual_mode
from flowrl.types import Conditioning, Prompt
from flowrl.values.bounds import Chunk, Processes, Text
from flowrl.values.check import checked
from flowrl.values.units import GIB

log = logging.getLogger(__name__)

TOLD = GIB
"""The number of bytes from which a user is told what goes to the disk."""
ABANDONED = 24 * 60 * 60
"""The age in seconds of a partial file that belongs to nobody: a row is written in less than one,
and a day is more than the clocks of the machines that share a folder are apart.
"""


class Store(Protocol):
    """Rows of conditioning by text, which is the key of a prompt with a picture; `truncated` has
    what the model does not see of a text, in words, where it cuts.
    """

    truncated: dict[str, str]
    is_shared: ClassVar[bool]
    """True where other processes of the run see its rows."""

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Return those of `texts` that are not there yet."""
        ...

    def expect(self, rows: Conditioning, count: int) -> None:
        """Prepare for `count` texts, with rows as large as these, before the first is added. Raises
        UserError where there is no room for them.
        """
        ...

    def add(self, texts: Sequence[str], rows: Conditioning) -> None:
        """Add one row a text."""
        ...

    def rows(self, texts: Sequence[str]) -> Conditioning:
        """Return one row for each of different texts, all of which must be there."""
        ...

    def to(self, device: torch.device) -> None:
        """Give rows on this device from now on."""
        ...


class PromptEmbeddings:
    """Conditioning by prompt, with the model's negative prompt beside each row where it has one.

    Texts are encoded up front, sorted and `chunk` at a time, the last chunk filled up, so that an
    embedding never depends on the batch it is first asked for in, and a resumed run sees the same
    bits. With a `folder` the rows are kept there, for later runs and for other processes of this
    one, and are read when asked for; otherwise they stay in memory, on the model's device. The text
    encoders are dropped afterwards, and not loaded where nothing is missing. Prompts that the model
    cuts are warned of once, whether they are encoded now or were so by an earlier run.

    Raises UserError where the folder cannot hold the rows.
    """

    @checked("embeddings")
    def __init__(
        self,
        model: TextModel,
        prompts: Iterable[Prompt],
        *,
        folder: Text | None,
        chunk: Chunk,
        num_processes: Processes = 1,
    ) -> None:
        self.negative = model.negative_prompt
        self._prompts = {prompt.key: prompt for prompt in prompts}
        check_pictures(model, list(self._prompts.values()))
        num_prompts = len(self._prompts)
        if self.negative is not None:
            self._prompts.setdefault(self.negative, Prompt(self.negative))
        texts = self._prompts.keys()
        self.store: Store = Memory()
        if folder is not None:
            self.store = Folder(Path(folder).expanduser(), model.embedding_key)
        absent = self.store.missing(sorted(texts))
        for text in absent:
            truncated = model.truncated_part(self._prompts[text].text)
            if truncated:
                self.store.truncated[text] = truncated
        # There is no process group yet, so the launcher tells processes apart.
        if rank() == 0:
            _warn_of_truncation(self.store.truncated, num_prompts)
        if absent:
            self._embed(model, sorted(texts), chunk, num_processes)
        model.drop_text_encoders()
        self._last: tuple[list[str], Conditioning] | None = None
        self._negative: Conditioning | None = None

    def _embed(self, model: TextModel, texts: list[str], size: int, num_processes: int) -> None:
        """Encode the texts that are missing, `size` at a time, as one of several processes."""
        chunks = [texts[i : i + size] for i in range(0, len(texts), size)]
        if self.store.is_shared:
            # Every process begins elsewhere and asks anew before each chunk: together they encode
            # each text about once.
            start = len(chunks) * rank() // num_processes
            chunks = chunks[start:] + chunks[:start]
        is_expected = False
        for chunk in chunks:
            if not self.store.missing(chunk):
                continue
            # A chunk is encoded whole, even where some of its texts are there already: rows of
            # other batch sizes would differ by rounding.
            filling = [chunk[-1]] * (size - len(chunk))
            rows = self._encode(model, chunk + filling)[: len(chunk)]
            # The first rows show how large all will be.
            if not is_expected:
                self.store.expect(rows, len(self.store.missing(texts)))
                is_expected = True
            self.store.add(chunk, rows)

    def _encode(self, model: TextModel, keys: Sequence[str]) -> Conditioning:
        """Encode the prompts of these keys, with their pictures where they carry any."""
        texts = [self._prompts[key].text for key in keys]
        files = [self._prompts[key].image for key in keys]
        pictures = [read_upright(Path(file.path)) for file in files if file is not None]
        if not pictures:
            return model.encode_prompts(texts)
        assert isinstance(model, EditModel)
        return model.encode_edits(texts, pictures)

    def to(self, device: torch.device) -> None:
        """Give rows on this device from now on."""
        self.store.to(device)
        self._last = None
        self._negative = None

    def __call__(self, prompts: Sequence[Prompt]) -> Conditioning:
        """Return a row for each prompt, in order, all of which must have been given at
        construction.
        """
        rows, numbers = self.shared(prompts)
        return rows[numbers]

    def shared(self, prompts: Sequence[Prompt]) -> tuple[Conditioning, Int[Tensor, "B"]]:
        """Return the rows of the different prompts among these, and which of them each one takes.

        Asked for the same ones as before, as for the micro-batches of one group, it returns the
        same tensors.
        """
        texts = [prompt.key for prompt in prompts]
        unique = list(dict.fromkeys(texts))
        if self._last is None or self._last[0] != unique:
            self._last = unique, self._rows(unique)
        rows = self._last[1]
        number = {text: i for i, text in enumerate(unique)}
        numbers = [number[text] for text in texts]
        return rows, torch.tensor(numbers, device=rows.device)

    def _rows(self, texts: Sequence[str]) -> Conditioning:
        rows = self.store.rows(texts)
        if self.negative is None:
            return rows
        # All rows have the same negative: it is read once, and expanded rather than copied.
        if self._negative is None:
            self._negative = self.store.rows([self.negative])
        return Conditioning(rows.tensors, repeated(self._negative, len(texts)))


class Memory:
    """A store that keeps all rows at hand."""

    is_shared: ClassVar[bool] = False

    def __init__(self) -> None:
        self.truncated: dict[str, str] = {}
        self._row: dict[str, dict[str, Tensor]] = {}

    def missing(self, texts: Sequence[str]) -> list[str]:
        return [text for text in texts if text not in self._row]

    def expect(self, rows: Conditioning, count: int) -> None:
        """Do nothing: memory that is short says so itself."""

    def add(self, texts: Sequence[str], rows: Conditioning) -> None:
        self._row |= zip(texts, split(rows), strict=True)

    def rows(self, texts: Sequence[str]) -> Conditioning:
        return join([self._row[text] for text in texts])

    def to(self, device: torch.device) -> None:
        for row in self._row.values():
            row.update({name: value.to(device) for name, value in row.items()})


class Folder:
    """A store with one safetensors file a text, under names made of the model's key and the text.

    A file is written under another name and then renamed, so that it is whole or not there, whoever
    else writes it; a file that cannot be read, holds another text, or does not say what of it was
    cut, counts as missing.
    """

    is_shared: ClassVar[bool] = True

    def __init__(self, root: Path, key: str) -> None:
        self.root = root
        self.key = key
        # Keys hold slashes and may be longer than a file's name: a digest is neither.
        self.folder = root / _digest(key)[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        _sweep(self.folder)
        self.truncated: dict[str, str] = {}
        self._device = torch.device("cpu")
        self._known: set[str] = set()

    def path(self, text: str) -> Path:
        """Return the file of a text."""
        return self.folder / f"{_digest(text)}.safetensors"

    def missing(self, texts: Sequence[str]) -> list[str]:
        absent = []
        for text in texts:
            if text in self._known:
                continue
            if self._holds(text):
                self._known.add(text)
            else:
                absent.append(text)
        return absent

    def _holds(self, text: str) -> bool:
        """Tell whether the row of a text is there, and note what of the text was cut."""
        path = self.path(text)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                label = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            log.warning("prompt embedding %s is damaged (%s): it is computed anew", path, error)
            return False
        # A file that does not say what was cut is computed anew, so that cut prompts are warned of.
        truncated = label.pop("truncated", None)
        if truncated is None or label != {"model": self.key, "prompt": text}:
            return False
        if truncated:
            self.truncated[text] = truncated
        return True

    def expect(self, rows: Conditioning, count: int) -> None:
        """Tell in a line how much goes to the disk, where it is much. Raises UserError where the
        disk has no room for it.
        """
        # Rows may differ in length: their mean stands for all.
        size = sum(value.nbytes for row in split(rows) for value in row.values())
        need = -(-count * size // len(rows))
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(
                f"embeddings.folder={self.root} has {free / GIB:.1f} GiB free, but the embeddings "
                f"of {count} prompts need {need / GIB:.1f} GiB; give a folder on another disk, "
                "fewer prompts, or embeddings.folder=null, which keeps them in memory, the GPU's "
                "where there is one"
            )
        if need > TOLD:
            sizes = f"{need / GIB:.1f} GiB ({free / GIB:.1f} GiB free)"
            print(
                f"embeddings of {count} prompts take {sizes} in embeddings.folder={self.root}",
                flush=True,
            )

    def add(self, texts: Sequence[str], rows: Conditioning) -> None:
        for text, row in zip(texts, split(rows), strict=True):
            # safetensors writes nothing but contiguous tensors.
            tensors = {name: value.cpu().contiguous() for name, value in row.items()}
            label = {"model": self.key, "prompt": text, "truncated": self.truncated.get(text, "")}
            self._write(self.path(text), tensors, label)

    def _write(self, path: Path, tensors: dict[str, Tensor], label: dict[str, str]) -> None:
        """Write one file, whole or not at all. Raises UserError where the folder takes none."""
        # Each writer has a name of its own, so that two never write into one file.
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            save_file(tensors, partial, metadata=label)
            grant_usual_mode(partial)
            partial.replace(path)
        except (SafetensorError, OSError) as error:
            # A quota, or another writer, left less room than there was.
            partial.unlink(missing_ok=True)
            reason = first_line(error)
            raise UserError(
                f"embeddings.folder={self.root} cannot be written to ({reason}); give another "
                "folder, or embeddings.folder=null, which keeps embeddings in memory"
            ) from error

    def rows(self, texts: Sequence[str]) -> Conditioning:
        return join([self._read(text) for text in texts]).to(self._device)

    def _read(self, text: str) -> dict[str, Tensor]:
        """Read the row of a text, its tensors by name."""
        with safe_open(self.path(text), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def to(self, device: torch.device) -> None:
        self._device = device


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed have left."""
    for path in folder.glob("*.partial"):
        # Another process was faster, or a colleague's file is not ours to remove.
        with suppress(OSError):
            age = time.time() - path.stat().st_mtime
            if age > ABANDONED:
                path.unlink()


def _warn_of_truncation(truncated: dict[str, str], count: int) -> None:
    """Warn in one line of the prompts that are cut, by the first of them in the alphabet."""
    if truncated:
        first = min(truncated)
        log.warning(
            "prompts longer than the model takes, which are cut: %d of %d; the first is %r: it "
            "loses %s",
            len(truncated),
            count,
            textwrap.shorten(first, 120),
            truncated[first],
        )
