"""The runtime type checker of the suite: beartype, behind jaxtyping's import hook where there are
shapes to check, and alone where there are none (see conftest). A checked call costs several times
as much behind jaxtyping, and the configuration's checks make millions of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beartype import BeartypeConf, BeartypeDecorPlace, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))
PLAIN = BeartypeConf(
    is_pep484_tower=True,
    claw_is_pep526=False,
    claw_decor_place_func=BeartypeDecorPlace.FIRST,
)
"""How packages are checked that name no shapes: the arguments and results of their functions, below
other decorators, so that what `flowrl.values.check.checked` refuses is told as users are told.
"""


def packages(folder: Path) -> tuple[list[str], list[str]]:
    """Name what is checked in the folder `flowrl`: packages and modules that name shapes, and
    packages that name none.
    """
    shaped, plain = [], []
    for path in folder.iterdir():
        # The shapes world has no tensors, and millions of calls.
        if path.stem in ("__init__", "__pycache__", "py", "shapes"):
            continue
        is_plain = path.is_dir() and not any(
            "jaxtyping" in file.read_text() for file in path.rglob("*.py")
        )
        (plain if is_plain else shaped).append(f"{folder.name}.{path.stem}")
    return shaped, plain


def check(target: Any) -> Any:
    """Check shapes and types of `target` at run time, except where a Protocol is not
    `runtime_checkable`.
    """
    try:
        return _strict(target)
    except BeartypeDecorHintPep3119Exception:
        return target
