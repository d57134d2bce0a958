"""The command line of a program, which is told as it was called: as a script of a checkout, or as a
subcommand of `flowrl`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from flowrl.cli import PROGRAMS


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of the program `name`, whose description keeps its lines.

    The descriptions show scripts. Where `flowrl` has called the program, they are shown as its
    subcommands.
    """
    as_written = argparse.RawDescriptionHelpFormatter
    if Path(sys.argv[0]).absolute().parent != Path(__file__).absolute().parent:
        return argparse.ArgumentParser(description=description, formatter_class=as_written)
    return argparse.ArgumentParser(
        prog=f"flowrl {name}",
        description=as_subcommands(description),
        formatter_class=as_written,
    )


def as_subcommands(text: str) -> str:
    """Replace the scripts that a text calls by the subcommands that do the same."""
    for name, (script, _) in PROGRAMS.items():
        text = re.sub(rf"(python )?(scripts/)?\b{re.escape(script)}", f"flowrl {name}", text)
    return text
