"""The hub's library where a repository is not to be had: its errors and its log."""

from __future__ import annotations

import logging

import httpx
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

UNREACHABLE = (
    "not in the local hub cache, and the hub cannot be reached; download it first, or give a folder"
)


def is_unreachable(error: BaseException | None) -> bool:
    """Tell whether an error, or what it came from, is that the hub cannot be reached.

    diffusers and transformers raise an OSError of their own, with the hub's error as its cause.
    """
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, httpx.TransportError)
    # Causes may lead in a circle, as where an error is raised again from what it caused.
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, kinds) or "connect to 'https://huggingface.co'" in str(error):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def print_once() -> None:
    """Leave the library's log, such as its retries, to its own handler, which prints it."""
    logging.getLogger("huggingface_hub").propagate = False
