"""Mistakes told in one line, with a suggestion for a misspelt key or option.

Imports Hydra, omegaconf and nothing heavier, so that a typo is answered before PyTorch is loaded.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.errors import UserError
from flowrl.launch.compose import CONF
from flowrl.values.wording import meant

NO_OPTION = "Config group override must be a string or a list"
"""How Hydra's error begins, which does not say which group it is about."""


def one_line_errors(main: Callable[[], Any], log: Path | None = None) -> int:
    """Call `main` and return the exit status: 0, 1 after an error, 130 after an interrupt.

    What the user asked for wrongly is printed as one line. Any other exception is a fault of the
    program: its traceback is appended to the file `log`, which the one line then names; without a
    `log` it is raised. FLOWRL_TRACEBACK=1 raises all of them.
    """
    # Hydra then raises instead of printing its own multi-line report.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("FLOWRL_TRACEBACK") or (log is None and not is_users(error)):
            raise
        text = explain(error)
        if log is not None and not is_users(_root(error)):
            text += _keep_traceback(error, log)
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


def _keep_traceback(error: Exception, log: Path) -> str:
    """Append the traceback to `log`; returns where it is, for the end of a one-line message."""
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as reason:  # a full disk, perhaps: then the terminal has to take it
        traceback.print_exception(error)
        return f" (its traceback stands above, since {log} cannot be written: {reason.strerror})"
    return f" (its traceback is in {log})"


def _root(error: BaseException) -> BaseException:
    """What made Hydra's instantiation of a configuration node fail, or the error itself where that
    is another one.
    """
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_users(error: BaseException) -> bool:
    """Whether an error is about what was asked for: one of FlowRL's own, the configuration, or a
    file by name.

    An error of a library is, where it came while a configuration node was instantiated, since the
    node can be named.
    """
    if (
        str(error).startswith(NO_OPTION)
        or type(error).__module__.startswith("flowrl.")
        or isinstance(error, (HydraException, OmegaConfBaseException))
    ):
        return True
    return isinstance(error, OSError) and bool(error.filename)


def explain(error: BaseException) -> str:
    """Put an error into one line: its innermost cause, with a suggestion for a misspelt key or
    option.
    """
    place = ""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        place = f"{key[1]}: " if key and not isinstance(error.__cause__, UserError) else ""
        error = error.__cause__
    text = place + (str(error).strip() or type(error).__name__)
    if (refusal := _refused_override(text)) is not None:
        return refusal
    # Logging hides the file it could not open; a mistake of the user's says all by itself.
    if isinstance(error.__cause__, OSError) and not isinstance(error, UserError):
        error = error.__cause__
    if isinstance(error, OSError) and error.filename:
        remedy = "give a path that exists"
        if not isinstance(error, FileNotFoundError):
            remedy = "make it accessible, or choose another output folder with run_dir=PATH"
        return f"{error.filename}: {error.strerror}; {remedy}"
    if match := re.search(r"\w+\(\) (got an unexpected) keyword argument (.*)", text):
        return f"{place}{match[1]} configuration key {match[2]}"
    if match := re.search(r"missing (?:a|\d+) required (?:keyword-only )?arguments?: (.*)", text):
        first = re.findall(r"'(\w+)'", match[1])[0]
        remedy = (
            "give what another version's run lacks, as in "
            f"++{place.replace(': ', '.')}{first}=VALUE"
        )
        return f"{place}missing configuration key {match[1]}; {remedy}"
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    line = " ".join(text.split("\n    full_key")[0].split())
    return (
        line
        if not isinstance(error, Exception) or is_users(error)
        else f"unexpected {type(error).__name__}: {line}"
    )


def _refused_override(text: str) -> str | None:
    """Hydra's message about an override that it does not take, in one line; None for any other
    message.
    """
    if text.startswith(NO_OPTION):
        return _no_option(sys.argv)
    if match := re.search(
        r"Could not find '([^']+)'.*?Available options in '([^']+)':\n((?:\t\S+\n)*)",
        text,
        re.DOTALL,
    ):
        group, option = match[1].rsplit("/", 1)
        options = match[3].split()
        return (
            f"{group}={option}: no such option{meant(option, options)}; choose one of "
            f"{', '.join(options)}"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        if (CONF / match[1]).is_dir():
            return _no_option(sys.argv)
        return (
            f"{match[1]}: unknown configuration key{_suggest(match[1])}; see conf/ or `python "
            "train.py --cfg job`"
        )
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values are a sweep, add -m; a list is written key=[a,b]"
    return None


def _no_option(words: Iterable[str]) -> str:
    """What is wrong with the first word of the command line that gives a group something else than
    an option.
    """
    for word in words:
        group, _, value = word.lstrip("+").partition("=")
        folder = CONF / group.partition("@")[0]
        if folder.is_dir() and value not in (
            names := sorted(path.stem for path in folder.glob("*.yaml"))
        ):
            return f"{word}: {group} is a group, of which one option is chosen: {', '.join(names)}"
    return f"{NO_OPTION}, such as loss=dppo"


def _suggest(key: str) -> str:
    """The nearest name to the part of `key` that is wrong: its first word, or where that exists its
    last.
    """
    first, _, rest = key.partition(".")
    tops = {str(name) for name in OmegaConf.load(CONF / "config.yaml")} - {"defaults"}
    tops |= {path.name for path in CONF.iterdir() if path.is_dir()}
    if first not in tops:
        close = difflib.get_close_matches(first, sorted(tops), n=1)
        found = ".".join(filter(None, (*close, rest))) if close else _nearest_anywhere(key)
    else:
        found = _nearest_anywhere(rest)
        found = found and f"{key.rpartition('.')[0]}.{found}"
    return f" (did you mean {found!r}?)" if found and found != key else ""


def _nearest_anywhere(key: str) -> str:
    names: set[str] = set()
    for path in CONF.rglob("*.yaml"):
        names |= set(re.findall(r"^\s*([a-z_]+):", path.read_text(), re.MULTILINE))
    return next(iter(difflib.get_close_matches(key.split(".")[-1], sorted(names), n=1)), "")
