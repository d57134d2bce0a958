"""Connections cannot be held open for nothing.

uvicorn's time-out for idle connections begins with the first answer and ends with the next byte, so
that a client that sends nothing, or a head byte by byte, is never let go; and its
`limit_concurrency` counts such connections against the requests of others. Hypercorn has a time-out
for each read and no bound on connections; granian runs an application in processes that it starts
itself. Neither bounds what all clients hold together, so neither would make this shorter.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from flowrl.serving.uploads import GRACE


class Connection(H11Protocol):
    """An HTTP connection that is closed where its client lets it wait for `timeout_keep_alive`
    seconds.

    The time runs from its start, or from its last answer, until the head of a request has arrived;
    and while its client does not read an answer. Of connections without a request,
    `limit_concurrency` may be open; beyond, the one that has waited longest is closed. Requests are
    not counted here: `flowrl.serving.uploads` bounds them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_idle = self.config.limit_concurrency
        # uvicorn would answer 503 to a request where others' connections are too many.
        self.limit_concurrency = None
        self.since = 0.0
        self.patience: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Tell whether no request is under way; a head that has not fully arrived is none."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        idle = []
        for connection in self.connections:
            if isinstance(connection, Connection) and connection.is_idle:
                idle.append(connection)
        if self.max_idle is not None and len(idle) > self.max_idle:
            # Not one that has just come: its request may be on the way.
            longest = min(idle, key=lambda connection: connection.since)
            if self.since - longest.since >= GRACE:
                longest.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.patience is not None:
            self.patience.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        # Called by asyncio where the client does not read, and the answer fills the buffer.
        super().pause_writing()
        self._wait()

    def close(self) -> None:
        """Close without waiting for the client to take what is left."""
        self.connections.discard(self)
        self.transport.abort()

    def _wait(self) -> None:
        """Begin to wait for the client anew."""
        self.since = self.loop.time()
        if self.patience is not None:
            self.patience.cancel()
        self.patience = self.loop.call_later(self.timeout_keep_alive, self._lose_patience)

    def _lose_patience(self) -> None:
        if self.is_idle or self.flow.write_paused:
            self.close()


def settings_for(
    app: Starlette,
    *,
    host: str,
    port: int,
    max_connections: int,
    idle_seconds: int,
    shutdown_seconds: int,
) -> uvicorn.Config:
    """Return uvicorn's settings for an application whose clients connect by `Connection` alone.

    Up to `max_connections` may wait for `idle_seconds` without a request. Requests under way when
    the server ends are finished, within `shutdown_seconds`.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=idle_seconds,
        timeout_graceful_shutdown=shutdown_seconds,
    )
