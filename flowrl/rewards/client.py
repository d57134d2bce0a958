"""Asking a scoring service over HTTP: time-outs, retries with back-off, a circuit breaker, size
limits, a token.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from flowrl.errors import UserError
from flowrl.values.bounds import Bytes, Count, Natural, Positive, Seconds, Text

RETRIED = frozenset({429, 500, 502, 503, 504})
"""Statuses that may pass; any other refusal is final."""

PROBE_SECONDS = 5.0
"""For one answer to a question that takes no work."""


class Unanswered(Exception):
    """Why a request has no answer."""


class Unavailable(Exception):
    """A failure that may pass: no connection, a time-out, an answer cut short, a status of
    `RETRIED`.
    """


class Unfit(Exception):
    """Why what answers is not the service that was meant; `setting` is the key below the service's
    to look at.
    """

    def __init__(self, reason: str, setting: str) -> None:
        super().__init__(reason)
        self.setting = setting


class Client:
    """POSTs JSON to a service, `concurrency` requests at a time. What gets no answer is reported,
    never raised.

    A try, its answer included, takes at most `timeout` seconds. What may pass is tried again up to
    `retries` times, after pauses of `backoff` seconds, doubling up to `max_backoff`, each shortened
    by up to half at random. `deadline` seconds after a call began, all its requests that have no
    answer are given up, however many wait for their turn; those being asked count as failed, since
    a service too slow for its deadline must not keep other processes waiting. After `open_after`
    requests in a row that failed in either way the circuit is open: requests fail at once for
    `open_seconds`, then get one try each until one succeeds. An answer has at most `max_answer`
    bytes. `token_env` names the environment variable that holds a bearer token; its value stands in
    no file and no message. `start_seconds` is how long a run waits for a service that is not there
    before it loads anything; with None, as for runs of earlier versions, it does not ask
    beforehand.
    """

    def __init__(
        self,
        *,
        timeout: Positive,
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
        least = {
            "timeout": (timeout, 1e-3),
            "deadline": (deadline, timeout),
            "retries": (retries, 0),
        }
        least |= {"concurrency": (concurrency, 1), "open_after": (open_after, 1)}
        least |= {"backoff": (backoff, 0), "max_answer": (max_answer, 1)}
        least |= {} if start_seconds is None else {"start_seconds": (start_seconds, 0)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise UserError(f"client.{name}={value} must be at least {bound}")
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
        """Status and content of one answer, without retries: GET, or POST of a `body`.

        Raises Unavailable where there is none, or a status that may pass, and Unfit for a refused
        token.
        """
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        try:
            with httpx.Client(
                headers=self._headers(), timeout=PROBE_SECONDS, trust_env=not _is_local(url)
            ) as http:
                response = http.request(method, url, content=content)
        except httpx.RequestError as error:
            raise Unavailable(str(error) or type(error).__name__) from error
        if response.status_code in (401, 403):
            token = (
                "no token was sent"
                if self.token_env is None
                else f"the token in {self.token_env} was refused"
            )
            raise Unfit(f"HTTP {response.status_code} from {url}: {token}", "client.token_env")
        if response.status_code in RETRIED - {500}:
            raise Unavailable(f"HTTP {response.status_code}")
        return response.status_code, response.content[: self.max_answer]

    def post_all(self, url: str, requests: Sequence[Mapping[str, Any]]) -> list[bytes | Unanswered]:
        """The body of the answer to each request, in their order, or why there is none."""
        return asyncio.run(self._post_all(url, requests))

    async def _post_all(
        self, url: str, requests: Sequence[Mapping[str, Any]]
    ) -> list[bytes | Unanswered]:
        places = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(
            headers=self._headers(), timeout=None, trust_env=not _is_local(url)
        ) as http:
            until = asyncio.get_running_loop().time() + self.deadline
            return await asyncio.gather(
                *(self._post(http, places, until, url, request) for request in requests)
            )

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        return headers

    async def _post(
        self,
        http: httpx.AsyncClient,
        places: asyncio.Semaphore,
        until: float,
        url: str,
        request: Mapping[str, Any],
    ) -> bytes | Unanswered:
        last = "no answer"
        attempt = 0
        try:
            async with asyncio.timeout_at(until), places:
                if not (num_tries := self._tries()):
                    return Unanswered(f"{url}: the circuit is open after repeated failures")
                body = _encoded(request)  # only now: many requests may wait
                for attempt in range(1, num_tries + 1):
                    if attempt > 1:
                        await asyncio.sleep(self._pause(attempt - 1))
                    try:
                        async with asyncio.timeout(self.timeout):
                            answer = await self._send(http, url, body)
                    except TimeoutError:
                        last = f"no answer within {self.timeout} s"
                    except (Unavailable, httpx.RequestError) as error:
                        last = str(error) or type(error).__name__
                    else:
                        self.failures_in_a_row = 0
                        return answer
        except TimeoutError:
            last += f"; given up client.deadline={self.deadline} s after the call began"
        except Unanswered as refusal:
            self.failures_in_a_row = 0
            return refusal
        if attempt:  # one that only waited for its turn tells nothing about the service
            self._note_failure()
        return Unanswered(f"{url}: {last}" + (f" ({attempt} tries)" if attempt > 1 else ""))

    async def _send(self, http: httpx.AsyncClient, url: str, body: bytes) -> bytes:
        answer = bytearray()
        async with http.stream("POST", url, content=body) as response:
            async for piece in response.aiter_bytes():
                answer += piece
                if len(answer) > self.max_answer:
                    raise Unanswered(
                        f"{url}: an answer of more than client.max_answer={self.max_answer} bytes"
                    )
        if not response.is_success:
            text = " ".join(answer[:200].decode(errors="replace").split())
            message = f"HTTP {response.status_code} {text}".strip()
            raise (
                Unavailable(message)
                if response.status_code in RETRIED
                else Unanswered(f"{url}: {message}")
            )
        return bytes(answer)

    def _tries(self) -> int:
        if self.failures_in_a_row < self.open_after:
            return self.retries + 1
        return int(time.monotonic() >= self.open_until)

    def _note_failure(self) -> None:
        self.failures_in_a_row += 1
        self.open_until = time.monotonic() + self.open_seconds

    def _pause(self, attempt: int) -> float:
        return min(self.backoff * 2 ** (attempt - 1), self.max_backoff) * self.jitter.uniform(
            0.5, 1.0
        )


def _encoded(request: Mapping[str, Any]) -> bytes:
    """The request as JSON. Raises Unanswered for one that is none, such as metadata of other
    types.
    """
    try:
        return json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Unanswered(f"the request cannot be sent as JSON: {error}") from error


def check_url(url: str, *endings: str) -> str:
    """A service's address without a slash at its end, and without paths of its pages, `endings`, in
    this order.

    Raises UserError for anything but http(s)://host[:port][/path].
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"reward.url={url} must be http://host:port or https://host:port")
    if parts.username or parts.password:
        raise UserError(
            "reward.url must not hold a password; name a variable with the token in "
            "client.token_env"
        )
    url = url.rstrip("/")
    for ending in endings:
        url = url.removesuffix(ending).rstrip("/")
    return url


def _is_local(url: str) -> bool:
    """Whether a service runs on this machine, whose own ports no proxy serves."""
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def is_object(content: bytes) -> bool:
    """Whether an answer is a JSON object, as services say; a web page is none."""
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False
