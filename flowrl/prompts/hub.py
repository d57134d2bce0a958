"""Prompts are read from a data set of the Hugging Face Hub, or from parquet files here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl import DISTRIBUTION
from flowrl.errors import UserError
from flowrl.prompts.jsonl import prompt_of
from flowrl.types import Prompt
from flowrl.values.bounds import Text
from flowrl.values.wording import meant

REMEDY = "give a data set's ORG/NAME on the hub, or a parquet file or a folder of them"

SAFE = 4
"""The first version of the library that runs no code of data sets."""

_KINDS: tuple[tuple[str, str], ...] = (
    (
        "is a gated dataset",
        "gated, and your token does not open it: accept its terms on the hub, then run `hf auth "
        "login` or set HF_TOKEN",
    ),
    (
        r"^(ConnectionError|OfflineModeIsEnabled|LocalEntryNotFoundError)",
        "not in the local cache, and the hub cannot be reached; download it first, or give its "
        "parquet files",
    ),
    ("BatchSize must be greater than 0", "it holds no row; give one with prompts"),
    (
        "^DatasetNotFoundError: Revision",
        "no such revision of it on the hub; give a branch, tag or commit",
    ),
    (
        "^DatasetNotFoundError",
        "no such data set on the hub, or a private one: check the name, or set HF_TOKEN",
    ),
)
"""What the library's errors mean, by their names and words; the more special ones come first."""


def hub_prompts(
    *,
    path: Text,
    config: Text | None,
    split: Text,
    column: Text,
    family: Text | None,
    metadata: Sequence[Text],
    revision: Text | None,
) -> list[Prompt]:
    """Read the prompts in a `column` of a data set's `split`, with the `metadata` of other columns.

    `path` is a data set of the hub, at `revision` and of its `config`, or a parquet file, which is
    the split `train`, or a folder of them. `family` names the column of the task family. Raises
    UserError where the package is missing, the data set is not to be had, and for a split, a column
    or a prompt that is not there.
    """
    data = _load(path, config, split, revision)
    keys = [("column", column), *(("metadata", name) for name in metadata)]
    if family:
        keys.append(("family", family))
    for key, name in keys:
        if name not in data.column_names:
            present = ", ".join(data.column_names)
            hint = meant(name, data.column_names)
            raise UserError(
                f"prompts path={path}: {key}={name} is none of its columns{hint}: {present}"
            )
    # Others, such as images, would be decoded row by row.
    columns = list(dict.fromkeys(name for _, name in keys))
    rows = data.select_columns(columns)
    prompts = []
    for number, row in enumerate(rows, 1):
        place = f"prompts {path} row {number}"
        _check_values(row, place)
        prompts.append(prompt_of(row, place, column, family, columns))
    if not prompts:
        raise UserError(f"prompts path={path}: its split {split!r} holds no row")
    return prompts


def _check_values(row: Mapping[str, Any], place: str) -> None:
    """Raise UserError, naming the column, for a value that a reward's request could not hold."""
    for name, value in row.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise UserError(
                f"{place}: {name!r} holds {kind}, which is no JSON value ({error}); leave the "
                "column out"
            ) from error


def _load(path: str, config: str | None, split: str, revision: str | None) -> Any:
    """Load a split as a table. Raises UserError where that is impossible."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            f"prompts path={path}: data=hub needs the package {error.name}; run: pip install "
            f"'{DISTRIBUTION}[hub]'"
        ) from error
    if int(datasets.__version__.partition(".")[0]) < SAFE:
        raise UserError(
            f"prompts path={path}: datasets {datasets.__version__} runs code of data sets; run: "
            f"pip install '{DISTRIBUTION}[hub]'"
        )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is told below
    source = _source(path, config, revision)
    errors = (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError)
    try:
        return datasets.load_dataset(split=split, **source)
    except errors as error:
        raise UserError(f"prompts path={path}: {_reason(error, split)}") from error


def _source(path: str, config: str | None, revision: str | None) -> Mapping[str, Any]:
    """Return what the library is asked for: a data set of the hub, or files here. Raises UserError
    for a path that is neither.
    """
    place = Path(path).expanduser()
    if not place.exists():
        is_marked = path.startswith((".", "~", "/")) or path.endswith(".parquet")
        if is_marked or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise UserError(f"prompts path={path}: no such file or folder; {REMEDY}")
        return {"path": path, "name": config, "revision": revision}
    for key, value in (("config", config), ("revision", revision)):
        if value is not None:
            raise UserError(
                f"prompts {key}={value} is for a data set of the hub, and {path} is here; "
                "leave it null"
            )
    if place.is_file():
        return {"path": "parquet", "data_files": {"train": str(place)}}
    if not any(place.rglob("*.parquet")):
        raise UserError(f"prompts path={path}: no parquet file below this folder; {REMEDY}")
    # Named, since the library would take whichever kind of file is the most common there.
    return {"path": "parquet", "data_dir": str(place)}


def _reason(error: Exception, split: str) -> str:
    """Say in one line what the library's error means, and the remedy where it is known."""
    # Where the data cannot be made sense of, the cause alone says why.
    cause = error.__cause__ if type(error).__name__.startswith("DatasetGeneration") else error
    cause = cause or error
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    if match := re.search(r"Unknown split .* one of \[(.*?)\]", text):
        splits = re.findall(r"'([^']+)'|(\b\w+\b)", match[1])
        names = [quoted or bare for quoted, bare in splits]
        return f"split={split} is none of its splits{meant(split, names)}: {', '.join(names)}"
    if match := re.search(r"Config name is missing.*?\[(.*?)\]", text):
        return f"it has several configurations; give one of {match[1]} as data.prompts.config"
    for pattern, words in _KINDS:
        if re.search(pattern, text):
            return words
    return f"cannot be read ({text[:200]})"
