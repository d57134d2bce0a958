"""Overrides and commands as text, quoted so that Hydra's grammar, omegaconf and a shell read back
what was meant.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from flowrl.runs.installation import COMMAND, REPOSITORY, TRAIN


def key_of(override: str) -> str:
    """Return the key that an override sets: `lora.rank` for `++lora.rank=4`."""
    return override.lstrip("+").partition("=")[0].strip()


def escape(text: str) -> str:
    """Return the text as a configuration value that means itself: `${` begins an interpolation
    otherwise.
    """
    # Backslashes before an interpolation would escape it, or one another, so they are doubled.
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def override(key: str, text: str) -> str:
    r"""Return `key=text` for Hydra's command line, whatever characters the text holds.

    A text that needs no quotes is left as it is. Otherwise it stands in double quotes, where Hydra
    takes a backslash for an escape only before a quote: so `"` becomes `\"`, and the backslashes
    before it or at the end are doubled.
    """
    if re.fullmatch(r"[A-Za-z_/][\w./-]*", text, re.ASCII) and text.lower() not in _WORDS:
        return f"{key}={text}"
    # Backslashes first: those that escape the quotes must stay single.
    with_doubled = re.sub(r'(\\+)(?="|\Z)', r"\1\1", escape(text))
    quoted = with_doubled.replace('"', r"\"")
    return f'{key}="{quoted}"'


_WORDS = ("null", "true", "false", "inf", "nan")
"""Texts that Hydra takes for another type."""


def resume_command(folder: str | Path, *, is_sweep: bool = False, flags: Sequence[str] = ()) -> str:
    """Return the command that continues the run or the sweep in `folder`, to be pasted into a
    shell; `flags` are those of this launch that it needs too.
    """
    sweeps = ["-m"] if is_sweep else []
    return shlex.join([*_program(), *flags, *sweeps, override("resume", str(folder))])


def called() -> str:
    """Return how a shell here calls the program that trains."""
    return shlex.join(_program())


def tool_command(name: str, script: str, *words: str) -> str:
    """Return the command that calls one of FlowRL's other programs: its script in a checkout, or
    the subcommand of `flowrl` where that is how this process was called.
    """
    if REPOSITORY is None or Path(sys.argv[0]).absolute() == COMMAND:
        return shlex.join([*_subcommand(name), *words])
    return shlex.join([interpreter(), f"scripts/{script}", *words])


def interpreter() -> str:
    """Return how a shell here calls the running Python: by its name where that leads to it, by its
    path where the environment that it belongs to is not activated.
    """
    running = Path(sys.executable)
    on_path = shutil.which("python")
    if on_path is not None and running.parent == Path(on_path).parent:
        return "python"
    # An environment in the project, such as .venv, is known by its short path.
    here = Path.cwd()
    if here in running.parents:
        return str(running.relative_to(here))
    return str(running)


def _program() -> list[str]:
    """Return the program as it was called; FlowRL's own by its name alone."""
    called = Path(sys.argv[0])
    is_private = called.suffix == ".py" and called.resolve() not in (TRAIN, COMMAND.resolve())
    if is_private:
        return [interpreter(), str(called)]
    if TRAIN == COMMAND or called.absolute() == COMMAND:
        return _subcommand("train")
    # Anything else, such as pytest or `python -c`, cannot continue a run.
    return [interpreter(), TRAIN.name]


def _subcommand(name: str) -> list[str]:
    """Return how a shell here calls a subcommand: by `flowrl` where that leads to the running
    Python's, or else as a module.
    """
    on_path = shutil.which("flowrl")
    if on_path is not None and Path(on_path).parent == Path(sys.executable).parent:
        return ["flowrl", name]
    return [interpreter(), "-m", "flowrl", name]
