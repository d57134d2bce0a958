"""Room for requests and for their bodies is bounded over all clients, and not held by slow ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from flowrl.serving.counters import Counters

GRACE = 1.0
"""Seconds that a body may fall behind its least rate before it must make room for another, where
there is none left.
"""


class Busy(Exception):
    """There is no room for a request now; it may come again."""


class TooSlow(Exception):
    """A body took longer than it may."""


@dataclass(eq=False, slots=True, kw_only=True)
class Upload:
    """A request under way, with the bytes of its body that are held and the time until which they
    have paid for its place.

    `timeout` is there while more of the body is awaited.
    """

    num_bytes: int
    paid_until: float
    timeout: asyncio.Timeout | None
    is_displaced: bool


class Uploads:
    """The requests under way, up to `max_requests`, and the bytes of their bodies, up to
    `max_bytes` together.

    A body pays for its place with its bytes: `min_rate` of them for each second, at most `GRACE`
    seconds ahead, so that many bytes at the start do not pay for few ones later. Where there is no
    room for a request or for its next bytes, the body that is furthest behind is given up, so that
    slow clients cannot lock others out, whether they stand still or send a byte now and then. Where
    none is behind, or the request itself is furthest, that request is given up. Both are told by
    Busy. Nobody is given up for being slow while there is room.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        max_bytes: int,
        min_rate: int,
        counters: Counters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.min_rate = min_rate
        self.counters = counters
        self.clock = clock
        self.uploads: set[Upload] = set()

    @contextmanager
    def admitted(self) -> Iterator[Upload]:
        """Hold a place among the requests under way. Raises Busy where there is none."""
        upload = Upload(
            num_bytes=0,
            paid_until=self.clock() + GRACE,
            timeout=None,
            is_displaced=False,
        )
        while len(self.uploads) >= self.max_requests:
            self._displace(upload, f"{len(self.uploads)} requests are under way already")
        self.uploads.add(upload)
        try:
            yield upload
        finally:
            self._remove(upload)

    @asynccontextmanager
    async def receiving(self, upload: Upload, seconds: float) -> AsyncIterator[None]:
        """Mark the time while the body arrives. Raises TooSlow after `seconds`, Busy where it had
        to make room.
        """
        try:
            async with asyncio.timeout(seconds) as upload.timeout:
                yield
        except TimeoutError:
            # Being displaced ends the time early, and is told below.
            if not upload.is_displaced:
                raise TooSlow from None
        finally:
            upload.timeout = None
        if upload.is_displaced:
            raise Busy(
                f"the body came slower than min_rate={self.min_rate} bytes a second and had to "
                "make room for others"
            )

    def add(self, upload: Upload, num_bytes: int) -> None:
        """Count bytes that have come. Raises Busy where there is no room for them."""
        upload.paid_until = min(upload.paid_until + num_bytes / self.min_rate, self.clock() + GRACE)
        if upload.is_displaced:  # it is told at its next turn
            return
        while self.counters.body_bytes + num_bytes > self.max_bytes:
            self._displace(upload, f"bodies of {self.counters.body_bytes} bytes are held already")
        upload.num_bytes += num_bytes
        self.counters.body_bytes += num_bytes

    def drop_bytes(self, upload: Upload) -> None:
        """Count the body as no longer held."""
        self.counters.body_bytes -= upload.num_bytes
        upload.num_bytes = 0

    def _displace(self, newcomer: Upload, reason: str) -> None:
        """Give up the slowest body for a newcomer's. Raises Busy where none is too slow."""
        # Bodies that have come whole keep their place: their clients have done what they could.
        awaited = [upload for upload in self.uploads if upload.timeout is not None]
        slowest = min(awaited, key=lambda upload: upload.paid_until, default=newcomer)
        if slowest is newcomer or slowest.timeout is None or self.clock() < slowest.paid_until:
            raise Busy(f"{reason}; try again later")
        slowest.is_displaced = True
        slowest.timeout.reschedule(asyncio.get_running_loop().time())
        self._remove(slowest)

    def _remove(self, upload: Upload) -> None:
        self.drop_bytes(upload)
        self.uploads.discard(upload)
