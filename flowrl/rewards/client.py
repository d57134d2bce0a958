"""A scoring service is asked over HTTP, with time-outs, retries with back-off, a circuit breaker,
size limits and a token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from flowrl.errors import UserError
from flowrl.values.bounds import Bytes, Count, Natural, Seconds, Text, Timeout
from flowrl.values.check import checked

RETRIED = frozenset({429, 500, 502, 503, 504})
"""Statuses that may pass; any other refusal is final."""

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Hosts that no other machine reaches."""

PROBE_SECONDS = 5.0
"""Time for a whole answer to a question that takes no work."""


_Result = TypeVar("_Result")


class Unanswered(Exception):
    """The reason why a request has no answer."""


class Unavailable(Exception):
    """A failure that may pass: no connection, a time-out, an answer cut short, a status of
    `RETRIED`; the service may ask for a pause of `retry_after` seconds.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Unfit(Exception):
    """The reason why what answers is not the service that was meant; `setting` is the key below the
    service's to look at.
    """

    def __init__(self, reason: str, setting: str) -> None:
        super().__init__(reason)
        self.setting = setting


class Client:
    """A client that POSTs JSON to a service, `concurrency` requests at a time. What gets no answer
    is reported, never raised.

    - A try, its answer included, takes at most `timeout` seconds.
    - What may pass is tried again up to `retries` times, after pauses of `backoff` seconds,
      doubling up to `max_backoff`, each shortened by up to half at random; longer where the service
      asks for it by `Retry-After`.
    - `deadline` seconds after a call began, all its requests that have no answer are given up,
      however many wait for their turn; those being asked count as failed, since a service too slow
      for its deadline must not keep other processes waiting.
    - After `open_after` requests in a row that failed in either way the circuit is open: requests
      fail at once for `open_seconds`, then get one try each until one succeeds.
    - An answer has at most `max_answer` bytes.
    - `token_env` names the environment variable that holds a bearer token; its value stands in no
      file and no message.
    - `start_seconds` is how long a run waits for a service that is not there before it loads
      anything; with None, as for runs of earlier versions, it does not ask beforehand.

    Raises UserError for a deadline shorter than one try, and for a variable that is not set.
    """

    @checked("client")
    def __init__(
        self,
        *,
        timeout: Timeout,
        deadline: Seconds,
        retries: Natural,
        backoff: Seconds,
        max_backoff: Seconds,
        concurrency: Count,
        open_after: Count,
        open_seconds: Seconds,
        max_answer: Bytes,
        token_env: Text | None,
        start_seconds: Seconds | None = None,
    ) -> None:
        if deadline < timeout:
            raise UserError(f"client.deadline={deadline} must be at least client.timeout={timeout}")
        if token_env is not None and not os.environ.get(token_env):
            raise UserError(
                f"client.token_env={token_env}: set the environment variable {token_env} to the "
                "token"
            )
        self.timeout = timeout
        self.deadline = deadline
        self.retries = retries
        self.concurrency = concurrency
        self.max_answer = max_answer
        self.backoff = backoff
        self.max_backoff = max_backoff
        self.open_after = open_after
        self.open_seconds = open_seconds
        self.token_env = token_env
        self.start_seconds = start_seconds
        self.failures_in_a_row = 0
        self.open_until = 0.0
        # Its own generator: jitter must not move the draws of a seeded run.
        self.jitter = random.Random()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it announces every request

    def probe(self, url: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """Return status and content of one answer, without retries: GET, or POST of a `body`.

        Raises Unavailable where there is none within `PROBE_SECONDS`, or a status that may pass,
        and Unfit for a refused token and an answer of more than `max_answer` bytes.
        """
        try:
            status, content = _run(self._probe(url, body))
        except Unanswered as error:
            raise Unfit(str(error), "client.max_answer") from error
        if status in (401, 403):
            token = "no token was sent"
            if self.token_env is not None:
                token = f"the token in {self.token_env} was refused"
            raise Unfit(f"HTTP {status} from {url}: {token}", "client.token_env")
        # A 500 is left to the caller: it comes from a program that is there.
        if status in RETRIED - {500}:
            raise Unavailable(f"HTTP {status}")
        return status, content

    async def _probe(self, url: str, body: Mapping[str, Any] | None) -> tuple[int, bytes]:
        method = "GET" if body is None else "POST"
        content = None if body is None else json.dumps(body).encode()
        async with self._http(url) as http:
            response, answer = await self._receive(http, method, url, content, PROBE_SECONDS)
        return response.status_code, answer

    def post_all(self, url: str, requests: Sequence[Mapping[str, Any]]) -> list[bytes | Unanswered]:
        """Return the body of the answer to each request, in their order, or why there is none."""
        return _run(self._post_all(url, requests))

    async def _post_all(
        self, url: str, requests: Sequence[Mapping[str, Any]]
    ) -> list[bytes | Unanswered]:
        turns = asyncio.Semaphore(self.concurrency)
        async with self._http(url) as http:
            until = asyncio.get_running_loop().time() + self.deadline
            answers = [self._post(http, turns, until, url, request) for request in requests]
            return await asyncio.gather(*answers)

    def _http(self, url: str) -> httpx.AsyncClient:
        # httpx has a time-out for each read, none for a whole answer: `_receive` bounds that.
        # `trust_env` takes a proxy from the environment.
        return httpx.AsyncClient(
            headers=self._headers(),
            timeout=None,
            trust_env=not _is_local(url),
        )

    def _headers(self) -> dict[str, str]:
        # Not compressed, so that `max_answer` bounds what an answer takes in memory.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        return headers

    async def _post(
        self,
        http: httpx.AsyncClient,
        turns: asyncio.Semaphore,
        until: float,
        url: str,
        request: Mapping[str, Any],
    ) -> bytes | Unanswered:
        """Ask until there is an answer, or no try or no time is left."""
        failure = "no answer"
        attempt = 0
        pause = 0.0
        try:
            # Waiting for a turn counts towards the deadline, hence this order.
            async with asyncio.timeout_at(until), turns:
                num_tries = self._tries()
                if not num_tries:
                    return Unanswered(f"{url}: the circuit is open after repeated failures")
                body = _encoded(request)  # only now: many requests may wait
                for attempt in range(1, num_tries + 1):
                    await asyncio.sleep(pause)
                    try:
                        answer = await self._try(http, url, body)
                    except Unavailable as error:
                        failure = str(error)
                        pause = max(self._pause(attempt), error.retry_after)
                    else:
                        self.failures_in_a_row = 0
                        return answer
        except TimeoutError:
            failure += f"; given up client.deadline={self.deadline} s after the call began"
        except Unanswered as refusal:  # the service answers, if only to refuse this request
            self.failures_in_a_row = 0
            return refusal
        if attempt:  # one that only waited for its turn tells nothing about the service
            self._note_failure()
        if attempt > 1:
            failure += f" ({attempt} tries)"
        return Unanswered(f"{url}: {failure}")

    async def _try(self, http: httpx.AsyncClient, url: str, body: bytes) -> bytes:
        """Ask once. Raises Unavailable where another try may help, and Unanswered where none
        can.
        """
        response, answer = await self._receive(http, "POST", url, body, self.timeout)
        if not response.is_success:
            # In one line: its beginning is part of a message.
            beginning = answer[:200].decode(errors="replace")
            text = " ".join(beginning.split())
            message = f"HTTP {response.status_code} {text}".strip()
            if response.status_code in RETRIED:
                raise Unavailable(message, _seconds(response.headers.get("Retry-After")))
            raise Unanswered(f"{url}: {message}")
        return answer

    async def _receive(
        self, http: httpx.AsyncClient, method: str, url: str, body: bytes | None, seconds: float
    ) -> tuple[httpx.Response, bytes]:
        """Send a request and receive the answer piece by piece, up to `max_answer` bytes in
        `seconds`, whatever its status.

        Raises Unavailable where none comes in time, and Unanswered for a longer one.
        """
        answer = bytearray()
        try:
            async with (
                asyncio.timeout(seconds),
                http.stream(method, url, content=body) as response,
            ):
                async for piece in response.aiter_bytes():
                    answer += piece
                    if len(answer) > self.max_answer:
                        raise Unanswered(
                            f"{url}: an answer of more than client.max_answer={self.max_answer} "
                            "bytes"
                        )
        except TimeoutError as error:
            raise Unavailable(f"no answer within {seconds} s") from error
        except httpx.RequestError as error:
            raise Unavailable(str(error) or type(error).__name__) from error
        return response, bytes(answer)

    def _tries(self) -> int:
        """Return how often a request may be tried: not at all while the circuit is open."""
        if self.failures_in_a_row < self.open_after:
            return self.retries + 1
        # Once the time is over a single try finds out whether the service is back.
        return int(time.monotonic() >= self.open_until)

    def _note_failure(self) -> None:
        self.failures_in_a_row += 1
        self.open_until = time.monotonic() + self.open_seconds

    def _pause(self, attempt: int) -> float:
        """Draw the seconds to wait after a failed try."""
        longest = min(self.backoff * 2 ** (attempt - 1), self.max_backoff)
        return longest * self.jitter.uniform(0.5, 1.0)


def _run(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end; where a loop runs already, as in a notebook, in a thread of its
    own.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a `Retry-After` asks for, which may be a date; 0 for one that cannot
    be read.
    """
    text = (retry_after or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def _encoded(request: Mapping[str, Any]) -> bytes:
    """Write a request as JSON. Raises Unanswered for one that cannot be, such as metadata of other
    types.
    """
    try:
        return json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Unanswered(f"the request cannot be sent as JSON: {error}") from error


def check_url(url: str, *endings: str) -> str:
    """Return a service's address without a slash at its end, and without paths of its pages,
    `endings`, in this order.

    Raises UserError for anything but http(s)://host[:port][/path].
    """
    address = urlsplit(url)
    is_http = address.scheme in ("http", "https")
    if not is_http or not address.hostname or address.query or address.fragment:
        raise UserError(f"reward.url={url} must be http://host:port or https://host:port")
    if address.username or address.password:
        raise UserError(
            "reward.url must not hold a password; name a variable with the token in "
            "client.token_env"
        )
    url = url.rstrip("/")
    for ending in endings:
        url = url.removesuffix(ending).rstrip("/")
    return url


def _is_local(url: str) -> bool:
    """Tell whether a service runs on this machine, whose own ports no proxy serves."""
    return urlsplit(url).hostname in LOCAL


def is_object(content: bytes) -> bool:
    """Tell whether an answer is a JSON object, as services say; a web page is none."""
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False
