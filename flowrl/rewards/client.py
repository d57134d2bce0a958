"""Asking a scoring service over HTTP: time-outs, retries with back-off, a circuit breaker, size limits, a token."""

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

from flowrl.bounds import Bytes, Count, Natural, Positive, Seconds, Text
from flowrl.errors import UserError

RETRIED = frozenset({429, 500, 502, 503, 504})
"""Statuses that may pass; any other refusal is final."""


class Unanswered(Exception):
    """Why a request has no answer."""


class Unavailable(Exception):
    """A failure that may pass: no connection, a time-out, an answer cut short, a status of `RETRIED`."""


class Client:
    """POSTs JSON to a service, `concurrency` requests at a time. What gets no answer is reported, never raised.

    A try, its answer included, takes at most `timeout` seconds. What may pass is tried again up to `retries` times,
    after pauses of `backoff` seconds, doubling up to `max_backoff`, each shortened by up to half at random. `deadline`
    seconds after a call began, all its requests that have no answer are given up, however many wait for their turn;
    those being asked count as failed, since a service too slow for its deadline must not keep other processes waiting.
    After `open_after` requests in a row that failed in either way the circuit is open: requests fail at once for
    `open_seconds`, then get one try each until one succeeds. An answer has at most `max_answer` bytes.
    `token_env` names the environment variable that holds a bearer token; its value stands in no file and no message.
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
    ) -> None:
        least = {"timeout": (timeout, 1e-3), "deadline": (deadline, timeout), "retries": (retries, 0)}
        least |= {"concurrency": (concurrency, 1), "open_after": (open_after, 1)}
        least |= {"backoff": (backoff, 0), "max_answer": (max_answer, 1)}
        for name, (value, bound) in least.items():
            if value < bound:
                raise UserError(f"client.{name}={value} must be at least {bound}")
        if token_env is not None and not os.environ.get(token_env):
            raise UserError(f"client.token_env={token_env}: set the environment variable {token_env} to the token")
        self.timeout, self.deadline, self.retries = timeout, deadline, retries
        self.concurrency, self.max_answer = concurrency, max_answer
        self.backoff, self.max_backoff = backoff, max_backoff
        self.open_after, self.open_seconds = open_after, open_seconds
        self.token_env = token_env
        self.failures_in_a_row = 0
        self.open_until = 0.0
        # Its own generator: jitter must not move the draws of a seeded run.
        self.jitter = random.Random()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it announces every request

    def post_all(self, url: str, requests: Sequence[Mapping[str, Any]]) -> list[bytes | Unanswered]:
        """The body of the answer to each request, in their order, or why there is none."""
        return asyncio.run(self._post_all(url, requests))

    async def _post_all(self, url: str, requests: Sequence[Mapping[str, Any]]) -> list[bytes | Unanswered]:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env]}"
        places = asyncio.Semaphore(self.concurrency)
        # A proxy never serves this machine's own ports.
        is_local = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        async with httpx.AsyncClient(headers=headers, timeout=None, trust_env=not is_local) as http:
            until = asyncio.get_running_loop().time() + self.deadline
            return await asyncio.gather(*(self._post(http, places, until, url, request) for request in requests))

    async def _post(
        self, http: httpx.AsyncClient, places: asyncio.Semaphore, until: float, url: str, request: Mapping[str, Any]
    ) -> bytes | Unanswered:
        last, attempt = "no answer", 0
        try:
            async with asyncio.timeout_at(until), places:
                if not (num_tries := self._tries()):
                    return Unanswered(f"{url}: the circuit is open after repeated failures")
                body = json.dumps(request).encode()  # only now: many requests may wait
                for attempt in range(1, num_tries + 1):
                    if attempt > 1:
                        await asyncio.sleep(self._pause(attempt - 1))
                    try:
                        async with asyncio.timeout(self.timeout):
                            answer = await self._send(http, url, body)
                    except TimeoutError:
                        last = f"no answer within {self.timeout} s"
                    except (Unavailable, httpx.TransportError) as error:
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
                    raise Unanswered(f"{url}: an answer of more than client.max_answer={self.max_answer} bytes")
        if not response.is_success:
            text = " ".join(answer[:200].decode(errors="replace").split())
            message = f"HTTP {response.status_code} {text}".strip()
            raise Unavailable(message) if response.status_code in RETRIED else Unanswered(f"{url}: {message}")
        return bytes(answer)

    def _tries(self) -> int:
        if self.failures_in_a_row < self.open_after:
            return self.retries + 1
        return int(time.monotonic() >= self.open_until)

    def _note_failure(self) -> None:
        self.failures_in_a_row += 1
        self.open_until = time.monotonic() + self.open_seconds

    def _pause(self, attempt: int) -> float:
        return min(self.backoff * 2 ** (attempt - 1), self.max_backoff) * self.jitter.uniform(0.5, 1.0)


def check_url(url: str) -> str:
    """A service's address without a slash at its end. Raises ValueError for anything but http(s)://host[:port][/path]."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"reward.url={url} must be http://host:port or https://host:port")
    if parts.username or parts.password:
        raise UserError("reward.url must not hold a password; name a variable with the token in client.token_env")
    return url.rstrip("/")
