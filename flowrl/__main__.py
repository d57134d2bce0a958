"""The command `flowrl`, also called as `python -m flowrl`: its first word names a program of
`flowrl.cli`, which the other words are for.
"""

from flowrl.launch.program import run_program

import os
import runpy
import sys

from flowrl.cli import PROGRAMS
from flowrl.errors import UserError


def main() -> int:
    """List the programs, or run the one that is named, as if it had been started itself."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        from flowrl import __version__  # which is looked up only now

        print(__version__)
        return 0
    if words[0] not in PROGRAMS:
        return run_program(lambda: refuse(words[0]))
    here = os.getcwd()
    if here not in sys.path and not sys.flags.safe_path:
        # For rewards and losses of one's own; last, so that no file here hides a package.
        sys.path.append(here)
    sys.argv = [sys.argv[0], *words[1:]]
    if {"-h", "--help"} & {*words[1:]} and print_help(words[0]):
        return 0
    # As the main module, so that what starts the program again, as Lightning does for each further
    # process, finds it there.
    runpy.run_module(f"flowrl.cli.{words[0]}", run_name="__main__", alter_sys=True)
    return 0


def overview() -> str:
    """Write a line for each program."""
    lines = [f"  flowrl {name:<9} {about}" for name, (_, about) in PROGRAMS.items()]
    return "\n".join(
        [
            "Reinforcement-learning fine-tuning of flow-matching image models.",
            "",
            *lines,
            "",
            "`flowrl SUBCOMMAND --help` tells more, `flowrl --version` the version.",
        ]
    )


def print_help(name: str) -> bool:
    """Print the help of a program without importing it; False for train's, which is Hydra's."""
    from flowrl.cli.arguments import PARSERS

    if name not in PARSERS:
        return False
    PARSERS[name]().print_help()
    return True


def refuse(word: str) -> None:
    """Raise UserError for a first word that names no program."""
    if "=" in word or word in ("-m", "--multirun", "--cfg"):
        raise UserError(f"{word}: a subcommand comes first, as in: flowrl train {word}")
    from flowrl.values.wording import meant  # which imports pydantic

    names = ", ".join(PROGRAMS)
    near = meant(word, [*PROGRAMS, "--help", "--version"])
    raise UserError(f"{word}: no such subcommand{near}; choose one of {names}")


if __name__ == "__main__":
    sys.exit(main())
