"""The words of a command line before Hydra reads them: slips of who knows other programs are
answered by the right form.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from flowrl.errors import UserError
from flowrl.runs.installation import CALL, CONF

WITH_VALUE = (
    "--config-path",
    "-cp",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--experimental-rerun",
)
"""Hydra's flags that the next word belongs to."""

ALONE = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--resolve",
    "--run",
    "-r",
    "--multirun",
    "-m",
    "--shell-completion",
    "-sc",
)
"""Hydra's flags that stand alone."""


def check_words(words: Sequence[str]) -> None:
    """Raise UserError for the first word that is neither a flag of Hydra's nor an override, and for
    a flag between overrides, which Hydra would not find.
    """
    overrides: list[int] = []
    i = 0
    while i < len(words):
        word = words[i]
        if word.startswith("-"):
            name, has_value, _ = word.partition("=")
            if not _is_flag(name):
                refuse_flag(words, i)
            i += 1 + (_takes_value(name) and not has_value)
            continue
        check_override(words, i)
        if overrides and overrides[-1] != i - 1:
            flag = " ".join(words[overrides[-1] + 1 : i])
            raise UserError(
                f"{flag} stands between overrides; flags come first: {CALL} {flag} "
                f"{words[overrides[-1]]} {word} ..."
            )
        overrides.append(i)
        i += 1


def flags_first(words: Sequence[str]) -> list[str]:
    """Return checked words with the flags before the overrides.

    Whoever starts this command line again may append overrides, as Lightning does for each further
    process, which must not stand behind a flag.
    """
    flags: list[str] = []
    overrides: list[str] = []
    i = 0
    while i < len(words):
        name, has_value, _ = words[i].partition("=")
        is_flag = words[i].startswith("-")
        length = 1 + (is_flag and _takes_value(name) and not has_value)
        (flags if is_flag else overrides).extend(words[i : i + length])
        i += length
    return [*flags, *overrides]


def typed_folders(words: Sequence[str]) -> list[Path]:
    """List the folders of configuration that words add to FlowRL's, by `--config-dir` or
    `hydra.searchpath`; those that are there.
    """
    folders: list[str] = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "-cd" or (len(name) > len("--config-") and "--config-dir".startswith(name)):
            folders += [value] if equals else words[i + 1 : i + 2]
        elif name.lstrip("+") == "hydra.searchpath":
            folders += re.findall(r"file://([^,'\"\]]+)", value)
    return [path for path in map(Path, folders) if path.is_dir()]


def _is_flag(name: str) -> bool:
    """Tell whether a word is one of Hydra's flags, or begins a long one as argparse allows it."""
    flags = (*WITH_VALUE, *ALONE)
    return name in flags or (len(name) > 3 and any(flag.startswith(name) for flag in flags))


def _takes_value(name: str) -> bool:
    """Tell whether the next word belongs to a flag, which argparse lets one shorten."""
    is_short = name in ALONE or len(name) <= 3
    return name in WITH_VALUE or (not is_short and any(f.startswith(name) for f in WITH_VALUE))


def refuse_flag(words: Sequence[str], i: int) -> None:
    """Raise UserError for `--seed=1`, `--seed 1` and `--seed`, where no flag has that name."""
    key, equals, value = words[i].lstrip("-").partition("=")
    if re.match(r"\d|\.", key):
        raise UserError(f"{words[i]}: a value needs its key; write KEY={words[i]}")
    shown = words[i]
    if not equals:
        value = "VALUE"
        if i + 1 < len(words) and "=" not in words[i + 1] and not words[i + 1].startswith("--"):
            value = words[i + 1]
            shown = f"{shown} {value}"
    key = key.replace("-", "_")
    raise UserError(f"{shown}: overrides have no dashes; write {key}={value}")


def check_override(words: Sequence[str], i: int) -> None:
    """Raise UserError for `sampler = cps`, `sampler= cps`, `sampler =cps`, `sampler cps` and
    `cps`, in the right form.
    """
    word = words[i]
    after = [*words[i + 1 : i + 3], "", ""]
    if word.startswith("="):
        raise UserError(f"{word}: an override is one word without spaces, KEY=VALUE")
    if "=" in word:
        # A value that is left empty may be meant; one that follows without a key is not.
        if word.endswith("=") and _is_bare(after[0]):
            _refuse_spaces(f"{word} {after[0]}", word + after[0])
        return
    if not word.startswith("~"):
        _refuse_bare(word, after)


def _refuse_bare(word: str, after: Sequence[str]) -> None:
    """Answer a word without `=`, by what stands `after` it."""
    if after[0] == "=" and after[1]:
        _refuse_spaces(f"{word} = {after[1]}", f"{word}={after[1]}")
    if after[0].startswith("="):
        _refuse_spaces(f"{word} {after[0]}", word + after[0])
    folders = [CONF, *typed_folders(sys.argv)]
    if any((folder / word).is_dir() for folder in folders) and _is_bare(after[0]):
        raise UserError(f"{word} {after[0]}: write {word}={after[0]}")
    files = [path for folder in folders for path in folder.glob(f"*/{word}.yaml")]
    groups = sorted(path.parent.name for path in files)
    example = f"{groups[0]}={word}" if groups else f"{word}=VALUE"
    raise UserError(f"{word}: an override has the form KEY=VALUE; write {example}")


def _is_bare(word: str) -> bool:
    """Tell whether a word is a value without a key."""
    return bool(word) and "=" not in word and not word.startswith(("-", "~"))


def _refuse_spaces(shown: str, form: str) -> None:
    raise UserError(f"{shown}: an override has no spaces; write {form}")
