"""The reward server has three pages: POST /score, GET /health, GET /metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flowrl.errors import UserError
from flowrl.parallel import background
from flowrl.rewards import wire
from flowrl.serving.batcher import Batcher
from flowrl.serving.counters import CONTENT_TYPE, Counters
from flowrl.serving.uploads import Busy, TooSlow, Upload, Uploads
from flowrl.values.bounds import Bytes, Count, Duration
from flowrl.values.check import check_fields

log = logging.getLogger(__name__)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits on what a request may ask for, and on what all of them may hold while they are
    read.

    - A body has up to `max_body` bytes and arrives within `body_seconds`.
    - All bodies that are held have up to `max_reading_bytes`, and one that comes slower than
      `min_rate` bytes a second makes room where there is none left.
    - `max_reading` requests are parsed and decoded at a time.
    - A request has up to `max_images`; each takes up to `max_image_bytes` once it is decoded, and
      the whole request `max_decoded_bytes`.
    """

    max_body: Bytes
    body_seconds: Duration
    min_rate: Bytes
    max_images: Count
    max_image_bytes: Bytes
    max_decoded_bytes: Bytes
    max_reading: Count
    max_reading_bytes: Bytes

    def __post_init__(self) -> None:
        check_fields(self, "limits")
        # A limit on one that exceeds that on all would let a request wait for ever.
        at_most("max_body", self.max_body, "limits.max_reading_bytes", self.max_reading_bytes)
        at_most(
            "max_image_bytes",
            self.max_image_bytes,
            "limits.max_decoded_bytes",
            self.max_decoded_bytes,
        )


def at_most(name: str, value: int, bound_name: str, bound: int) -> None:
    """Raise UserError where a limit exceeds another one, which stands under `bound_name`."""
    if value > bound:
        raise UserError(f"limits.{name}={value} must be at most {bound_name}={bound}; lower it")


class Refused(Exception):
    """A request that gets a status and a reason instead of scores."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Pages:
    """The pages over one batcher; `token`, where there is one, is asked of /score alone."""

    def __init__(
        self,
        *,
        name: str,
        batcher: Batcher,
        counters: Counters,
        limits: Limits,
        max_requests: int,
        token: str | None,
    ) -> None:
        self.name = name
        self.batcher = batcher
        self.counters = counters
        self.limits = limits
        self.token = token
        self.uploads = Uploads(
            max_requests=max_requests,
            max_bytes=limits.max_reading_bytes,
            min_rate=limits.min_rate,
            counters=counters,
        )
        self.reading = asyncio.Semaphore(limits.max_reading)

    async def score(self, request: Request) -> Response:
        """Answer a request for scores, whatever happens, and count it."""
        start = time.perf_counter()
        response: Response
        try:
            response = JSONResponse(await self._score(request))
        except Refused as refusal:
            # The client is asked to come again where there was no room.
            headers = {"Retry-After": "1"} if refusal.status == 503 else None
            response = JSONResponse({"error": str(refusal)}, refusal.status, headers)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; counted only
        except Exception:
            log.exception("a request failed")
            response = JSONResponse({"error": "internal error"}, 500)
        self.counters.requests.labels(response.status_code).inc()
        self.counters.request_seconds.observe(time.perf_counter() - start)
        return response

    async def _score(self, request: Request) -> dict[str, object]:
        """Score a request. Raises Refused, with the status and the reason, where it gets none."""
        if not self._is_authorized(request):
            raise Refused(401, "wrong or missing bearer token")
        try:
            with self.uploads.admitted() as upload:
                # The body has no name here, so that `_answer` alone holds it and can let it go.
                return await _while_listening(
                    request, self._answer(upload, await self._body(request, upload))
                )
        except wire.TooLarge as error:
            raise Refused(413, str(error)) from error
        except UserError as error:
            raise Refused(422, str(error)) from error
        except Busy as error:
            raise Refused(503, str(error)) from error
        except TooSlow:
            raise Refused(
                408, f"the body took longer than body_seconds={self.limits.body_seconds}"
            ) from None

    def _is_authorized(self, request: Request) -> bool:
        """Tell whether a request has the token, where there is one."""
        if self.token is None:
            return True
        header = request.headers.get("authorization", "")
        expected = f"Bearer {self.token}"
        # Compared in a time that does not tell how much of the token was right. As bytes, since
        # the function takes no text beyond ASCII.
        return hmac.compare_digest(header.encode(), expected.encode())

    async def _answer(self, upload: Upload, body: bytearray) -> dict[str, object]:
        """Read a body, wait for the request's turn, and write its scores."""
        read = partial(
            wire.read_request,
            body,
            max_images=self.limits.max_images,
            max_image_bytes=self.limits.max_image_bytes,
            max_decoded_bytes=self.limits.max_decoded_bytes,
        )
        asked = await self._read(read)
        prompts = asked.prompts
        # Room is taken before the images are decoded, which is when they grow.
        with self.batcher.place(len(prompts), asked.num_bytes):
            pixels = await self._read(asked.pixels)
            del body, asked, read  # what waits is held once
            self.uploads.drop_bytes(upload)
            output = await self.batcher.score(pixels, prompts)
            return wire.answer(output)

    async def _read(self, work: Callable[[], Result]) -> Result:
        """Return the result of `work`, done in a thread that keeps its turn to the end even where
        nobody waits for it.
        """
        await self.reading.acquire()
        future = asyncio.wrap_future(background.start(work, "reader"))
        # Given back when the thread ends, not when this is cancelled: threads cannot be stopped,
        # and those of clients that left must not come on top of `max_reading`.
        future.add_done_callback(lambda _: self.reading.release())
        return await asyncio.shield(future)

    async def _body(self, request: Request, upload: Upload) -> bytearray:
        """Receive a body. Raises Refused where it is too large, and what `Uploads` raises."""
        limit = self.limits.max_body
        too_large = Refused(
            413, f"a body of more than max_body={limit} bytes; send fewer images at a time"
        )
        # Refused before it is sent, where its length is said; otherwise when it has come so far.
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        async with self.uploads.receiving(upload, self.limits.body_seconds):
            async for piece in request.stream():
                if len(body) + len(piece) > limit:
                    raise too_large
                self.uploads.add(upload, len(piece))
                body += piece
        return body

    async def health(self, request: Request) -> Response:
        """Answer that the server is there, with the name of its reward and the images that wait."""
        return JSONResponse({"status": "ok", "reward": self.name, "waiting": self.counters.waiting})

    async def metrics(self, request: Request) -> Response:
        """Answer with the counters as Prometheus reads them."""
        return Response(self.counters.text(), media_type=CONTENT_TYPE)


async def _while_listening(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, which is cancelled when the client leaves. Raises
    ClientDisconnect then.
    """
    task = asyncio.create_task(work)
    departure = asyncio.create_task(_departure(request))
    try:
        # Whoever is first ends the other.
        await asyncio.wait((task, departure), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        departure.cancel()


async def _departure(request: Request) -> None:
    """Wait until the client leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(pages: Pages) -> Starlette:
    """Build the application, whose batcher runs from start to shutdown."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(pages.batcher.run())
        yield
        task.cancel()
        # Awaited, so that it has ended before the event loop does.
        with suppress(asyncio.CancelledError):
            await task

    routes = [
        Route("/score", pages.score, methods=["POST"]),
        Route("/health", pages.health, methods=["GET"]),
        Route("/metrics", pages.metrics, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)
