"""Mistakes told in one line, with a suggestion for a misspelt key or option.

This module imports Hydra, omegaconf and nothing heavier, so that a typo is answered before PyTorch
is loaded.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.errors import UserError
from flowrl.launch.interrupts import INTERRUPTED, noted_interrupts
from flowrl.launch.words import typed_folders
from flowrl.runs.files import LOADER
from flowrl.runs.installation import CALL, CONF
from flowrl.values.wording import meant

NO_OPTION = "Config group override must be a string or a list"
"""How Hydra's error begins, which does not say which group it is about."""


def one_line_errors(main: Callable[[], Any], log: Path | None = None) -> int:
    """Call `main` and return the exit status: 0, 1 after an error, 130 after an interrupt.

    An error that follows an interrupt is the interrupt's: a library that was stopped within its
    imports raises one of its own, without KeyboardInterrupt among its causes.

    What the user asked for wrongly is printed as one line. Any other exception is a fault of the
    program: its traceback is appended to the file `log`, which the one line then names; without a
    `log` it is raised. FLOWRL_TRACEBACK=1 raises all of them.
    """
    # Hydra then raises instead of printing its own multi-line report.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        with noted_interrupts() as interrupts:
            main()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if interrupts:
            return INTERRUPTED
        if os.environ.get("FLOWRL_TRACEBACK") or (log is None and not is_users(error)):
            raise
        text = explain(error)
        if log is not None and not is_users(root_of(error)):
            text += _keep_traceback(error, log)
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


def _keep_traceback(error: Exception, log: Path) -> str:
    """Append the traceback to `log`, and return where it is, for the end of a one-line message."""
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError as reason:  # a full disk, perhaps: then the terminal has to take it
        traceback.print_exception(error)
        return f" (its traceback stands above, since {log} cannot be written: {reason.strerror})"
    return f" (its traceback is in {log})"


def root_of(error: BaseException) -> BaseException:
    """Return what made Hydra's instantiation of a configuration node fail, or the error itself
    where that is another one.
    """
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_users(error: BaseException) -> bool:
    """Tell whether an error is about what was asked for: one of FlowRL's own, the configuration, or
    a file by name.

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
    place = _place(error)
    error = root_of(error)
    text = place + (str(error).strip() or type(error).__name__)
    if (refusal := _refused_override(text)) is not None:
        return refusal
    # Logging hides the file it could not open; a mistake of the user's says all by itself.
    if isinstance(error.__cause__, OSError) and not isinstance(error, UserError):
        error = error.__cause__
    if isinstance(error, OSError) and error.filename:
        return _inaccessible(error)
    if (mismatch := _wrong_argument(text, place)) is not None:
        return mismatch
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    line = " ".join(text.split("\n    full_key")[0].split())
    if isinstance(error, Exception) and not is_users(error):
        return f"unexpected {type(error).__name__}: {line}"
    return line


def _place(error: BaseException) -> str:
    """Return the key of the innermost node that Hydra could not instantiate, with a colon; empty
    where there is none, or where the cause names its key itself.
    """
    place = ""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        place = f"{key[1]}: " if key and not isinstance(error.__cause__, UserError) else ""
        error = error.__cause__
    return place


def _inaccessible(error: OSError) -> str:
    remedy = "make it accessible, or choose another output folder with run_dir=PATH"
    if isinstance(error, FileNotFoundError):
        remedy = "give a path that exists"
    return f"{error.filename}: {error.strerror}; {remedy}"


def _wrong_argument(text: str, place: str) -> str | None:
    """Say of Python's message about a call's arguments which configuration keys of the node at
    `place` it means; None for any other message.
    """
    if match := re.search(r"\w+\(\) (got an unexpected) keyword argument (.*)", text):
        return f"{place}{match[1]} configuration key {match[2]}"
    if match := re.search(r"missing (?:a|\d+) required (?:keyword-only )?arguments?: (.*)", text):
        first = re.findall(r"'(\w+)'", match[1])[0]
        key = place.replace(": ", ".") + first
        remedy = f"give what another version's run lacks, as in ++{key}=VALUE"
        return f"{place}missing configuration key {match[1]}; {remedy}"
    return None


def _refused_override(text: str) -> str | None:
    """Put Hydra's message about an override that it does not take into one line; None for any other
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
        suggestion = meant(option, options)
        choices = ", ".join(options) + _private(group, option)
        return f"{group}={option}: no such option{suggestion}; choose one of {choices}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        # Hydra says so too of a group that is given a value, such as loss=null.
        if any((folder / key).is_dir() for folder in _folders()):
            return _no_option(sys.argv)
        return f"{key}: unknown configuration key{_suggest(key)}; see conf/ or `{CALL} --cfg job`"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values are a sweep, add -m; a list is written key=[a,b]"
    return None


def _private(group: str, option: str) -> str:
    """Say how an option is read that lies in the folder conf/ of the working directory; an empty
    text where there is none. It is not read by itself: whoever made the folder could run code.
    """
    path = Path("conf", group, f"{option}.yaml")
    is_read = Path("conf").resolve() == CONF
    return f"; {path} is read with --config-dir conf" if path.is_file() and not is_read else ""


def _no_option(words: Iterable[str]) -> str:
    """Say what is wrong with the first word of the command line that gives a group something else
    than an option.
    """
    for word in words:
        group, _, value = word.lstrip("+").partition("=")
        places = [folder / group.partition("@")[0] for folder in _folders()]
        names = sorted({path.stem for place in places for path in place.glob("*.yaml")})
        if names and value not in names:
            return f"{word}: {group} is a group, of which one option is chosen: {', '.join(names)}"
    return f"{NO_OPTION}, such as loss=dppo"


def _folders() -> list[Path]:
    """List FlowRL's folder of configuration, and those that the command line adds."""
    return [CONF, *typed_folders(sys.argv)]


def _option_files() -> list[Path]:
    """List the files of the options of all groups, but of groups within groups."""
    # Not all that lies deeper: a folder of the user's may be any.
    return [path for folder in _folders() for path in sorted(folder.glob("*/*.yaml"))]


def _suggest(key: str) -> str:
    """Suggest the key with the nearest name in place of the word that is wrong: the first, or where
    that exists the last.
    """
    # A key that stands deeper, such as lr, comes before one that only looks like it.
    if places := _places_of(key):
        return f" (did you mean {places[0]!r}?)"
    return _suggest_similar(key)


def _suggest_similar(key: str) -> str:
    """Suggest the key whose name is nearest."""
    first, _, below = key.partition(".")
    tops = {str(name) for name in OmegaConf.load(CONF / "config.yaml")} - {"defaults"}
    tops |= {path.name for path in CONF.iterdir() if path.is_dir()}
    tops |= {path.parent.name for path in _option_files()}
    if first in tops:
        nearest = _nearest_below(key)
    elif close := difflib.get_close_matches(first, sorted(tops), n=1):
        nearest = ".".join(filter(None, (*close, below)))
    else:
        nearest = _nearest_anywhere(key)
    return f" (did you mean {nearest!r}?)" if nearest and nearest != key else ""


def _places_of(word: str) -> list[str]:
    """List the dotted keys that end in a word, the shortest first."""
    places = [key for key in _all_keys() if key.endswith(f".{word}")]
    return sorted(places, key=lambda key: key.count("."))


def _nearest_below(key: str) -> str:
    """Return the end of a key that is a key itself, as of one that stands below another group; or
    else the nearest one of its first word's. Empty where there is none.
    """
    known = _all_keys()
    words = key.split(".")
    ends = [".".join(words[number:]) for number in range(1, len(words))]
    if standing := [end for end in ends if end in known]:
        return standing[0]
    below = [name for name in known if name.startswith(f"{words[0]}.")]
    close = difflib.get_close_matches(key, sorted(set(below)), n=1, cutoff=0.8)
    return close[0] if close else ""


def _all_keys() -> list[str]:
    """List the dotted keys of the main file and of all options, where they stand once composed."""
    main = yaml.load((CONF / "config.yaml").read_text(), LOADER)
    found = list(_keys(main))
    for path in _option_files():
        text = path.read_text(errors="replace")
        prefix = "" if "@package _global_" in text else f"{path.parent.name}."
        try:
            content = yaml.load(text, LOADER)
        except yaml.YAMLError:
            continue  # one of the user's, which says so itself where it is chosen
        found += [f"{prefix}{key}" for key in _keys(content)]
    return found


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Walk the dotted keys of a YAML file."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")


def _nearest_anywhere(key: str) -> str:
    """Return the key of any YAML file that is nearest to a key's last word; empty where none is."""
    names: set[str] = set()
    # As text, since composing every file to learn its keys would take seconds.
    for path in {*CONF.rglob("*.yaml"), *_option_files()}:
        text = path.read_text(errors="replace")
        names |= set(re.findall(r"^\s*([a-z_]+):", text, re.MULTILINE))
    last_word = key.split(".")[-1]
    close = difflib.get_close_matches(last_word, sorted(names), n=1)
    return close[0] if close else ""
