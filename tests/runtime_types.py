"""The runtime type checker of the suite: beartype, behind jaxtyping's import hook (see
conftest).
"""

from __future__ import annotations

from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

_strict = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(target: Any) -> Any:
    """Check shapes and types of `target` at run time, except where a Protocol is not
    `runtime_checkable`.
    """
    try:
        return _strict(target)
    except BeartypeDecorHintPep3119Exception:
        return target
