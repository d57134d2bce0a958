"""Room for requests and for their bodies: bounded over all clients, and not held by those that stand still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from flowrl.serving.counters import Counters

SILENCE = 1.0
"""Seconds without a byte after which a client must make room for another, where there is none left."""


class Busy(Exception):
    """There is no room for a request now; it may come again."""


class TooSlow(Exception):
    """A body that took longer than it may."""


@dataclass(eq=False, slots=True, kw_only=True)
class Upload:
    """A request under way: the bytes of its body that are held, and when the last of them came.

    `timeout` is there while more of the body is awaited.
    """

    num_bytes: int
    heard: float
    timeout: asyncio.Timeout | None
    is_displaced: bool


class Uploads:
    """The requests under way, up to `max_requests`, and the bytes of their bodies, up to `max_bytes` together.

    Where there is no room for a request or for its next bytes, the body that has stood still longest, and for at least
    `SILENCE` seconds, is given up, so that slow clients cannot lock others out. Where none has, the request itself is.
    Both are told by Busy.
    """

    def __init__(self, *, max_requests: int, max_bytes: int, counters: Counters) -> None:
        self.max_requests, self.max_bytes, self.counters = max_requests, max_bytes, counters
        self.uploads: set[Upload] = set()

    @contextmanager
    def admitted(self) -> Iterator[Upload]:
        """A place among the requests under way. Raises Busy where there is none."""
        upload = Upload(num_bytes=0, heard=time.monotonic(), timeout=None, is_displaced=False)
        while len(self.uploads) >= self.max_requests:
            self._displace(upload, f"{len(self.uploads)} requests are under way already")
        self.uploads.add(upload)
        try:
            yield upload
        finally:
            self._remove(upload)

    @asynccontextmanager
    async def receiving(self, upload: Upload, seconds: float) -> AsyncIterator[None]:
        """The time while the body arrives. Raises TooSlow after `seconds`, Busy where it had to make room."""
        try:
            async with asyncio.timeout(seconds) as upload.timeout:
                yield
        except TimeoutError:
            if not upload.is_displaced:
                raise TooSlow from None
        finally:
            upload.timeout = None
        if upload.is_displaced:
            raise Busy("the body stood still and had to make room for others")

    def add(self, upload: Upload, num_bytes: int) -> None:
        """Count bytes that have come. Raises Busy where there is no room for them."""
        upload.heard = time.monotonic()
        if upload.is_displaced:  # it is told at its next turn
            return
        while self.counters.body_bytes + num_bytes > self.max_bytes:
            self._displace(upload, f"bodies of {self.counters.body_bytes} bytes are held already")
        upload.num_bytes += num_bytes
        self.counters.body_bytes += num_bytes

    def drop_bytes(self, upload: Upload) -> None:
        """The body is no longer held."""
        self.counters.body_bytes -= upload.num_bytes
        upload.num_bytes = 0

    def _displace(self, newcomer: Upload, reason: str) -> None:
        awaited = [upload for upload in self.uploads if upload.timeout is not None and upload is not newcomer]
        slowest = min(awaited, key=lambda upload: upload.heard, default=newcomer)
        if slowest.timeout is None or time.monotonic() - slowest.heard < SILENCE:
            raise Busy(f"{reason}; try again later")
        slowest.is_displaced = True
        slowest.timeout.reschedule(asyncio.get_running_loop().time())
        self._remove(slowest)

    def _remove(self, upload: Upload) -> None:
        self.drop_bytes(upload)
        self.uploads.discard(upload)
