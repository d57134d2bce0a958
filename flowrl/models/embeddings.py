"""Prompt embeddings, computed once for all prompts of a run, then looked up: in memory, or in a
folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import textwrap
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowrl.errors import UserError
from flowrl.models.protocol import TextModel
from flowrl.types import Conditioning, Prompt
from flowrl.values.bounds import Chunk, Text

log = logging.getLogger(__name__)

GIB = 2**30
TOLD = GIB
"""Bytes from which a user is told what goes to the disk."""
ABANDONED = 24 * 60 * 60
"""Seconds. A row is written in less than one, so that a partial file of a day belongs to nobody,
however far the clocks of the machines that share a folder are apart.
"""


class Store(Protocol):
    """Rows of conditioning by text; `truncated` has what the model does not see of a text, in
    words, where it cuts.
    """

    truncated: dict[str, str]

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Those of `texts` that are not there yet."""
        ...

    def expect(self, rows: Conditioning, count: int) -> None:
        """Before the first is added: `count` texts are to come, with rows as large as these. Raises
        UserError where there is no room for them.
        """
        ...

    def add(self, texts: Sequence[str], rows: Conditioning) -> None:
        """Take in one row a text."""
        ...

    def rows(self, texts: Sequence[str]) -> Conditioning:
        """One row for each of different texts, all of which must be there."""
        ...

    def to(self, device: torch.device) -> None:
        """Where rows are given."""
        ...


class PromptEmbeddings:
    """Conditioning by prompt, with the model's negative prompt beside each row where it has one.

    Texts are encoded up front, sorted and `chunk` at a time, the last chunk filled up, so that an
    embedding never depends on the batch it is first asked for in, and a resumed run sees the same
    bits. With a `folder` the rows are kept there, for later runs and for other processes of this
    one, and are read when asked for; otherwise they stay in memory, on the model's device. The text
    encoders are dropped afterwards, and not loaded where nothing is missing. Prompts that the model
    cuts are warned of once, whether they are encoded now or were so by an earlier run.
    """

    def __init__(
        self, model: TextModel, prompts: Iterable[Prompt], *, folder: Text | None, chunk: Chunk
    ) -> None:
        if chunk < 1:
            raise UserError(f"embeddings.chunk={chunk} must be at least 1")
        self.negative = model.negative_prompt
        own = {prompt.text for prompt in prompts}
        texts = sorted(own if self.negative is None else own | {self.negative})
        self.store: Store = (
            Memory() if folder is None else Folder(Path(folder).expanduser(), model.embedding_key)
        )
        rank = int(os.environ.get("RANK", 0))
        size = int(os.environ.get("WORLD_SIZE", 1))
        chunks = [texts[i : i + chunk] for i in range(0, len(texts), chunk)]
        absent = self.store.missing(texts)
        self.store.truncated |= {
            text: part for text in absent if (part := model.truncated_part(text))
        }
        if rank == 0:
            _warn_of_truncation(self.store.truncated, len(own))
        if absent:
            # Every process begins elsewhere and asks anew before each chunk: together they encode
            # each text about once.
            start = 0 if folder is None else len(chunks) * rank // size
            self._embed(model, chunks[start:] + chunks[:start], chunk)
        model.drop_text_encoders()
        self._last: tuple[list[str], Conditioning] | None = None

    def _embed(self, model: TextModel, chunks: list[list[str]], size: int) -> None:
        is_expected = False
        for part in chunks:
            if self.store.missing(part):
                rows = model.encode_prompts(part + [part[-1]] * (size - len(part)))[: len(part)]
                if not is_expected:
                    self.store.expect(rows, sum(len(self.store.missing(each)) for each in chunks))
                    is_expected = True
                self.store.add(part, rows)

    def to(self, device: torch.device) -> None:
        """Where rows are given."""
        self.store.to(device)
        self._last = None

    def __call__(self, prompts: Sequence[Prompt]) -> Conditioning:
        """A row for each of some prompts, all of which must have been given at construction."""
        rows, numbers = self.shared(prompts)
        return rows[numbers]

    def shared(self, prompts: Sequence[Prompt]) -> tuple[Conditioning, Int[Tensor, "B"]]:
        """The rows of the different prompts among these, and which of them each one takes.

        Asked for the same ones as before, as for the micro-batches of one group, it gives the same
        tensors.
        """
        texts = [prompt.text for prompt in prompts]
        unique = list(dict.fromkeys(texts))
        if self._last is None or self._last[0] != unique:
            self._last = unique, self._rows(unique)
        rows = self._last[1]
        number = {text: i for i, text in enumerate(unique)}
        return rows, torch.tensor([number[text] for text in texts], device=rows.pooled.device)

    def _rows(self, texts: Sequence[str]) -> Conditioning:
        rows = self.store.rows(texts)
        if self.negative is None:
            return rows
        one = self.store.rows([self.negative])
        count = len(texts)
        return Conditioning(
            rows.tokens,
            rows.pooled,
            Conditioning(one.tokens.expand(count, -1, -1), one.pooled.expand(count, -1)),
        )


class Memory:
    """All rows in two tensors."""

    def __init__(self) -> None:
        self.truncated: dict[str, str] = {}
        self._row: dict[str, int] = {}
        self._parts: list[Conditioning] = []

    def missing(self, texts: Sequence[str]) -> list[str]:
        return [text for text in texts if text not in self._row]

    def expect(self, rows: Conditioning, count: int) -> None:
        """Memory that is short says so itself."""

    def add(self, texts: Sequence[str], rows: Conditioning) -> None:
        self._row |= {text: len(self._row) + i for i, text in enumerate(texts)}
        self._parts.append(rows)

    def rows(self, texts: Sequence[str]) -> Conditioning:
        if len(self._parts) > 1:
            self._parts = [_concatenate(self._parts)]
        return self._parts[0][torch.tensor([self._row[text] for text in texts])]

    def to(self, device: torch.device) -> None:
        self._parts = [
            Conditioning(part.tokens.to(device), part.pooled.to(device)) for part in self._parts
        ]


class Folder:
    """One safetensors file a text, under names made of the model's key and the text.

    A file is written under another name and then renamed, so that it is whole or not there, whoever
    else writes it; a file that cannot be read, holds another text, or does not say what of it was
    cut, counts as missing.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.root = root
        self.key = key
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        _sweep(self.folder)
        self.truncated: dict[str, str] = {}
        self._device = torch.device("cpu")
        self._known: set[str] = set()

    def path(self, text: str) -> Path:
        """The file of a text."""
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

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
        path = self.path(text)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            log.warning("prompt embedding %s is damaged (%s): it is computed anew", path, error)
            return False
        truncated = found.pop("truncated", None)
        if truncated is None or found != {"model": self.key, "prompt": text}:
            return False
        if truncated:
            self.truncated[text] = truncated
        return True

    def expect(self, rows: Conditioning, count: int) -> None:
        """Tells in a line how much goes to the disk, where it is much."""
        need = count * (rows.tokens[0].nbytes + rows.pooled[0].nbytes)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(
                f"embeddings.folder={self.root} has {free / GIB:.1f} GiB free, but the embeddings "
                f"of {count} prompts "
                f"need {need / GIB:.1f} GiB; give a folder on another disk, fewer prompts, or "
                "embeddings.folder=null, "
                "which keeps them in memory, the GPU's where there is one"
            )
        if need > TOLD:
            sizes = f"{need / GIB:.1f} GiB ({free / GIB:.1f} GiB free)"
            print(
                f"embeddings of {count} prompts take {sizes} in embeddings.folder={self.root}",
                flush=True,
            )

    def add(self, texts: Sequence[str], rows: Conditioning) -> None:
        for i, text in enumerate(texts):
            partial = self.path(text).with_suffix(f".{uuid.uuid4().hex}.partial")
            tensors = {
                "tokens": rows.tokens[i].cpu().contiguous(),
                "pooled": rows.pooled[i].cpu().contiguous(),
            }
            label = {"model": self.key, "prompt": text, "truncated": self.truncated.get(text, "")}
            try:
                save_file(tensors, partial, metadata=label)
                partial.replace(self.path(text))
            except (
                SafetensorError,
                OSError,
            ) as error:  # a quota, or another writer, left less room than there was
                partial.unlink(missing_ok=True)
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"embeddings.folder={self.root} cannot be written to ({reason}); give another "
                    "folder, or "
                    "embeddings.folder=null, which keeps embeddings in memory"
                ) from error

    def rows(self, texts: Sequence[str]) -> Conditioning:
        tokens, pooled = zip(*(self._read(text) for text in texts), strict=True)
        return Conditioning(
            torch.stack(tokens).to(self._device), torch.stack(pooled).to(self._device)
        )

    def _read(self, text: str) -> tuple[Tensor, Tensor]:
        with safe_open(self.path(text), framework="pt") as file:
            return file.get_tensor("tokens"), file.get_tensor("pooled")

    def to(self, device: torch.device) -> None:
        self._device = device


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed have left."""
    for path in folder.glob("*.partial"):
        # Another process was faster, or a colleague's file is not ours to remove.
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _warn_of_truncation(truncated: dict[str, str], count: int) -> None:
    if truncated:
        first = min(truncated)
        log.warning(
            "prompts longer than the model takes, which are cut: %d of %d; the first is %r: it "
            "loses %s",
            *(len(truncated), count, textwrap.shorten(first, 120), truncated[first]),
        )


def _concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    return Conditioning(
        torch.cat([part.tokens for part in parts]), torch.cat([part.pooled for part in parts])
    )
