"""Units that more than one module counts in."""

from __future__ import annotations

GIB = 2**30
"""Bytes."""
