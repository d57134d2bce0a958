"""The command line of a program, which is told as it was called: as a script of a checkout, or as a
subcommand of `flowrl`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flowrl.cli import PROGRAMS
from flowrl.errors import UserError
from flowrl.launch.words import check_override, refuse_flag, refuse_misspelt
from flowrl.runs.installation import PACKAGE


class Parser(argparse.ArgumentParser):
    """A parser whose help shows examples before anything else, and whose refusals are UserError, of
    one line.
    """

    examples = ""

    def format_help(self) -> str:
        """Write the examples, and then what argparse writes."""
        return f"Examples:\n{self.examples}\n\n{super().format_help()}"

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read words of which some are overrides of a configuration.

        Raises UserError, in the right form, for an override with dashes, and where all words that
        are no flags' are overrides, for one that is none.
        """
        self._check_flags(args)
        parsed, others = super().parse_known_intermixed_args(args, namespace)
        overrides = getattr(parsed, "overrides", [])
        for i, word in enumerate(overrides):
            if not word.startswith("-"):
                check_override(overrides, i)
        return parsed, others

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read words none of which are overrides. Raises UserError for a flag that there is not."""
        self._check_flags(args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with what is wrong, and where the right form stands."""
        raise UserError(f"{message}; see {self.prog} --help")

    def _check_flags(self, args: Sequence[str] | None) -> None:
        """Raise UserError for the first word that looks like a flag and is none."""
        words = sys.argv[1:] if args is None else list(args)
        for i, word in enumerate(words):
            # A number may be a flag's value; what follows two dashes alone is no flag.
            if word == "--":
                break
            if re.match(r"--?[A-Za-z]", word) and not self._has_flag(word):
                self._refuse(words, i)

    def _has_flag(self, word: str) -> bool:
        """Tell whether a word is one of the flags, or begins a long one as argparse allows it."""
        name = word.partition("=")[0]
        if not word.startswith("--"):
            return name[:2] in self._option_string_actions
        return any(flag.startswith(name) for flag in self._option_string_actions)

    def _refuse(self, words: Sequence[str], i: int) -> None:
        """Raise UserError for a word that looks like a flag and is none."""
        refuse_misspelt(words[i], self._option_string_actions)
        if not {"overrides", "words"} & {action.dest for action in self._actions}:
            self.error(f"{words[i]}: no such flag")
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
