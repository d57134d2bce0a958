"""The place of the package: a checkout, which has its configuration and train.py beside it, or an
installation from a wheel, which holds the one and does without the other.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).absolute().parents[1]


def find_repository() -> Path | None:
    """Return the checkout that the package is used from; None where it was installed from a wheel,
    since that alone puts conf/ into the package.
    """
    return None if (PACKAGE / "conf").is_dir() else PACKAGE.parent


REPOSITORY = find_repository()

CONF = (REPOSITORY or PACKAGE) / "conf"
"""The folder of FlowRL's YAML files."""

COMMAND = PACKAGE / "cli" / "train.py"
"""The program behind `flowrl train`, which is called by that name."""

TRAIN = COMMAND if REPOSITORY is None else REPOSITORY / "train.py"
"""The program that trains, where no other one was called."""

CALL = "flowrl train" if REPOSITORY is None else "python train.py"
"""How a text shows a call of it."""
