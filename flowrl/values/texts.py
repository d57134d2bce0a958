"""Lists of texts and of pairs of texts, in data that others wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard


def are_texts(value: object) -> TypeGuard[Sequence[str]]:
    """Tell whether a value is a list of texts, or another sequence of them."""
    return _is_list(value) and all(isinstance(text, str) for text in value)


def are_pairs(value: object) -> TypeGuard[Sequence[Sequence[str]]]:
    """Tell whether a value is a list of pairs of texts, as `vqa_list` of questions and answers."""
    return _is_list(value) and all(are_texts(pair) and len(pair) == 2 for pair in value)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    # To Python a text is a sequence too, of its letters.
    return isinstance(value, Sequence) and not isinstance(value, str)
