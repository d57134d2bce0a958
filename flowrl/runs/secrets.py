"""The names of keys whose values are secrets, which stand in no label and nothing published."""

from __future__ import annotations

import re

_SECRET = re.compile(r"(token|password|passwd|secret|credentials?|(api|access|private)_?key)$")


def is_secret(key: str) -> bool:
    """Tell whether a key, of which the last name counts, holds a secret; `token_env` names one."""
    return _SECRET.search(key.lower()) is not None
