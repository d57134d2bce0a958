"""Counts with their nouns, for messages and pages."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, which has an s unless there is one."""
    return f"{count} {noun}{'s' * (count != 1)}"
