"""Write a project of your own: a reward, a loss, configuration, prompts and a test.

    flowrl new acme
    cd acme && flowrl train --config-dir conf experiment=first debug=smoke
    cd acme && python -m pytest

It is a folder NAME with the Python package NAME in it, whose reward and loss run on the embedded
model as they are; its README.md shows the commands. Nothing is installed.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import importlib.util
import keyword
import re
import sys
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from flowrl import DISTRIBUTION
from flowrl.cli import arguments
from flowrl.errors import UserError

TEMPLATE = Path(__file__).with_name("templates") / "project"
SUFFIX = ".jinja"
NAME = "NAME"
"""Stands in the template's paths for the project's name."""


def write_project(name: str, place: Path) -> Path:
    """Write the project `name` into a new folder of `place`, and return it.

    Raises UserError for a name that is no Python package's, that hides an installed package, or of
    which there is a folder.
    """
    folder = place / name
    check_name(name)
    if folder.exists():
        raise UserError(f"new {name}: {folder} exists; take another name, or remove it")
    check_free(name)
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    values = {"name": name, "distribution": name.replace("_", "-"), "flowrl": DISTRIBUTION}
    for source in sorted(TEMPLATE.rglob(f"*{SUFFIX}")):
        target = folder / target_of(source.relative_to(TEMPLATE), name)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = environment.from_string(source.read_text(encoding="utf-8")).render(values)
        target.write_text(text, encoding="utf-8")
    return folder


def target_of(source: Path, name: str) -> Path:
    """Return the path in the project of a template's path."""
    path = source.with_suffix("")
    # A wheel's patterns pass over files whose names begin with a dot.
    if path.name == "gitignore":
        path = path.with_name(".gitignore")
    return Path(*(step.replace(NAME, name) for step in path.parts))


def check_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a Python package."""
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name):
        return
    possible = re.sub(r"\W+", "_", name.lower(), flags=re.ASCII).strip("_0123456789")
    suggestion = f", such as {possible}" if possible and not keyword.iskeyword(possible) else ""
    raise UserError(
        f"new {name}: no name of a Python package; take lower-case letters, digits and "
        f"underscores{suggestion}"
    )


def check_free(name: str) -> None:
    """Raise UserError for a name by which Python finds another package or module already."""
    if name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise UserError(
            f"new {name}: Python has a package of that name here, and yours would hide it or be "
            "hidden; take another"
        )


def main() -> None:
    """Read the command line, write the project, and say how to begin."""
    args = arguments.new().parse_args()
    folder = write_project(args.name, Path())
    print(
        f"{folder}/: a package with a reward and a loss, conf/, prompts/, tests/ and README.md\n"
        f"  cd {folder}\n"
        "  flowrl train --config-dir conf experiment=first debug=smoke"
    )


if __name__ == "__main__":
    raise SystemExit(run_program(main))
