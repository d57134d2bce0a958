"""The command line of a program, which is told as it was called: as a script of a checkout, or as a
subcommand of `flowrl`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowrl.cli import PROGRAMS
from flowrl.errors import UserError
from flowrl.launch.words import check_override, refuse_flag
from flowrl.runs.installation import PACKAGE

NEAR = 0.8
"""The likeness, of 1, from which a word is taken for a misspelt flag, not for an override."""


class Parser(argparse.ArgumentParser):
    """A parser whose help shows examples before anything else."""

    examples = ""

    def format_help(self) -> str:
        """Write the examples, and then what argparse writes."""
        return f"Examples:\n{self.examples}\n\n{super().format_help()}"

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read words of which some are overrides of a configuration.

        Raises UserError, in the right form, for an override with dashes, and where all words that
        are no flags' are overrides, for one that is none.
        """
        words = sys.argv[1:] if args is None else list(args)
        for i, word in enumerate(words):
            # A number may be a flag's value; what follows two dashes alone is no flag.
            if word == "--":
                break
            if re.match(r"--?[A-Za-z]", word) and not self._has_flag(word):
                self._refuse(words, i)
        parsed, others = super().parse_known_intermixed_args(args, namespace)
        overrides = getattr(parsed, "overrides", [])
        for i, word in enumerate(overrides):
            if not word.startswith("-"):
                check_override(overrides, i)
        return parsed, others

    def _has_flag(self, word: str) -> bool:
        """Tell whether a word is one of the flags, or begins a long one as argparse allows it."""
        name = word.partition("=")[0]
        if not word.startswith("--"):
            return name[:2] in self._option_string_actions
        return any(flag.startswith(name) for flag in self._option_string_actions)

    def _refuse(self, words: Sequence[str], i: int) -> None:
        """Raise UserError for a word that looks like a flag and is none."""
        name = words[i].partition("=")[0]
        if close := difflib.get_close_matches(name, self._option_string_actions, 1, NEAR):
            raise UserError(f"{words[i]}: no such flag; did you mean {close[0]}?")
        refuse_flag(words, i)


def make_parser(name: str, text: str) -> Parser:
    """Make the parser of the program `name`. Its `text` keeps its lines; the first paragraph that
    is indented holds examples.

    They show scripts. Where `flowrl` has called the program, they are shown as its subcommands.
    """
    prog = None
    if is_subcommand():
        prog = f"flowrl {name}"
        text = as_subcommands(text)
    examples, description = split(text)
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=prog, description=description, formatter_class=as_written)
    parser.examples = examples
    return parser


def is_subcommand() -> bool:
    """Tell whether `flowrl` has called this program, or is about to tell of it."""
    called = Path(sys.argv[0]).absolute()
    is_door = called.name == "flowrl" or called == PACKAGE / "__main__.py"
    return is_door or called.parent == PACKAGE / "cli"


def split(text: str) -> tuple[str, str]:
    """Return the examples of a program's text, and the text without them."""
    paragraphs = text.strip().split("\n\n")
    examples = next((part for part in paragraphs if part.startswith("    ")), "")
    if examples:
        paragraphs.remove(examples)
    return examples, "\n\n".join(paragraphs)


def as_subcommands(text: str) -> str:
    """Replace the scripts that a text calls by the subcommands that do the same."""
    for name, (script, _) in PROGRAMS.items():
        if script:
            text = re.sub(rf"(python )?(scripts/)?\b{re.escape(script)}", f"flowrl {name}", text)
    return text


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--config-dir` to a program that composes a configuration."""
    parser.add_argument(
        "--config-dir",
        type=Path,
        metavar="DIR",
        help="a folder of configuration of your own, searched after FlowRL's",
    )
