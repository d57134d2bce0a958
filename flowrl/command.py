"""What train.py needs before PyTorch is loaded: the configuration's resolvers, and mistakes told in one line.

Imports Hydra, omegaconf and nothing heavier, so that a typo is answered at once.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parents[1] / "conf"
CONFIG = "config.yaml"
"""The resolved configuration in a run's folder, by which one is known."""


def register_resolvers() -> None:
    """The resolvers that YAML files use.

    `${run_folder:RESUME,RUN_DIR,NEW}` is the run to resume, the folder asked for, or a new one;
    `${image_tokens:RESOLUTION,PIXELS}` the length of a square image's sequence of tokens of PIXELS a side.
    """
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("image_tokens", lambda side, pixels: (side // pixels) ** 2, replace=True)


def _run_folder(resume: str | None, run_dir: str | None, new: str) -> str:
    if resume and not (Path(resume) / CONFIG).is_file():
        raise ValueError(f"resume={resume}: no {CONFIG} there; give the folder of an earlier run")
    # Resolved, since `outputs/latest` is a link that this very run will move.
    return str(Path(resume).resolve()) if resume else run_dir or new


def one_line_errors(main: Callable[[], Any]) -> int:
    """Call `main`; 0, or 1 after printing a user's mistake as one line. Other exceptions keep their traceback."""
    # Hydra then raises instead of printing its own multi-line report.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("FLOWRL_TRACEBACK") or not is_users(error):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def is_users(error: Exception) -> bool:
    """Whether an error is about what the user asked for: a ValueError, a path, the configuration, or one of our own."""
    is_own = type(error).__module__.startswith("flowrl.")
    return is_own or isinstance(error, (HydraException, OmegaConfBaseException, ValueError, OSError))


def explain(error: BaseException) -> str:
    """The innermost cause of an error, in one line, with a suggestion for a misspelt key or option."""
    place = ""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        place = f"{key[1]}: " if key and not isinstance(error.__cause__, ValueError) else ""
        error = error.__cause__
    text = place + (str(error).strip() or type(error).__name__)
    if match := re.search(
        r"Could not find '([^']+)'.*?Available options in '([^']+)':\n((?:\t\S+\n)*)", text, re.DOTALL
    ):
        group, option = match[1].rsplit("/", 1)
        options = match[3].split()
        return f"{group}={option}: no such option{meant(option, options)}; choose one of {', '.join(options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: unknown configuration key{_suggest(match[1])}; see conf/ or `python train.py --cfg job`"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values are a sweep, add -m; a list is written key=[a,b]"
    if isinstance(error.__cause__, OSError):  # logging hides the file it could not open
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
        remedy = f"give what another version's run lacks, as in ++{place.replace(': ', '.')}{first}=VALUE"
        return f"{place}missing configuration key {match[1]}; {remedy}"
    text = text.removeprefix("ValueError raised while resolving interpolation: ")
    return " ".join(text.split("\n    full_key")[0].split())


def meant(word: str, names: Iterable[str]) -> str:
    """The nearest of some names to a misspelt one, as words for a message; empty where none is near."""
    close = difflib.get_close_matches(word, sorted(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _suggest(key: str) -> str:
    """The nearest name to the part of `key` that is wrong: its first word, or where that exists its last."""
    first, _, rest = key.partition(".")
    tops = {str(name) for name in OmegaConf.load(CONF / "config.yaml")} - {"defaults"}
    tops |= {path.name for path in CONF.iterdir() if path.is_dir()}
    if first not in tops:
        close = difflib.get_close_matches(first, sorted(tops), n=1)
        found = ".".join(filter(None, (*close, rest))) if close else _nearest_anywhere(key)
    else:
        found = _nearest_anywhere(rest)
        found = found and f"{key.rpartition('.')[0]}.{found}"
    return f" (did you mean {found!r}?)" if found else ""


def _nearest_anywhere(key: str) -> str:
    names: set[str] = set()
    for path in CONF.rglob("*.yaml"):
        names |= set(re.findall(r"^\s*([a-z_]+):", path.read_text(), re.MULTILINE))
    return next(iter(difflib.get_close_matches(key.split(".")[-1], sorted(names), n=1)), "")
