"""The command line of a program, which is told as it was called: as a script of a checkout, or as a
subcommand of `flowrl`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from flowrl.cli import PROGRAMS
from flowrl.runs.installation import PACKAGE


class Parser(argparse.ArgumentParser):
    """A parser whose help shows examples before anything else."""

    examples = ""

    def format_help(self) -> str:
        """Write the examples, and then what argparse writes."""
        return f"Examples:\n{self.examples}\n\n{super().format_help()}"


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
