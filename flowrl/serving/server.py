"""Runs a reward's server until it is told to stop."""

from __future__ import annotations

import logging
import os

import torch
import uvicorn

from flowrl.errors import UserError
from flowrl.rewards.protocol import Reward
from flowrl.serving.app import Limits, Pages, build_app
from flowrl.serving.batcher import Batcher
from flowrl.serving.connections import Connection
from flowrl.serving.counters import Counters
from flowrl.training.reward import RewardModule

log = logging.getLogger(__name__)


def serve(
    reward: Reward,
    *,
    host: str,
    port: int,
    device: str,
    limits: Limits,
    max_batch: int,
    max_batch_bytes: int,
    max_wait: float,
    max_waiting: int,
    max_waiting_bytes: int,
    max_connections: int,
    idle_seconds: int,
    shutdown_seconds: float,
    token_env: str | None,
) -> None:
    """Serve `reward` at `host`:`port` until SIGINT or SIGTERM.

    Requests under way are then finished, within `shutdown_seconds`. Up to `max_connections`
    requests are under way at a time, and as many connections may wait for one, each for
    `idle_seconds`. `device` is `auto` (CUDA where there is any) or a torch device. `token_env`
    names the environment variable with the bearer token that /score asks for. Port 0 takes a free
    one; the line that announces the server names it.
    """
    least = {
        "max_batch": max_batch,
        "max_connections": max_connections,
        "idle_seconds": idle_seconds,
    }
    for name, value in least.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    for name, value, bound_name, bound in (
        ("max_images", limits.max_images, "max_waiting", max_waiting),
        ("max_image_bytes", limits.max_image_bytes, "max_batch_bytes", max_batch_bytes),
        ("max_decoded_bytes", limits.max_decoded_bytes, "max_waiting_bytes", max_waiting_bytes),
    ):
        if value > bound:
            raise UserError(f"limits.{name}={value} must be at most {bound_name}={bound}; lower it")
    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise UserError(
            f"token_env={token_env}: set the environment variable {token_env} to the token"
        )
    if token is None and host not in ("localhost", "127.0.0.1", "::1"):
        log.warning("host=%s without token_env: whoever reaches the port can use the scorer", host)
    place = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device == "auto"
        else torch.device(device)
    )
    module = RewardModule(reward=reward, max_missing=1.0).to(place)
    counters = Counters()
    batcher = Batcher(
        lambda images, prompts: module.score(images.to(place), prompts),
        max_batch=max_batch,
        max_batch_bytes=max_batch_bytes,
        max_wait=max_wait,
        max_waiting=max_waiting,
        max_waiting_bytes=max_waiting_bytes,
        counters=counters,
    )
    name = type(reward).__name__
    pages = Pages(
        name=name,
        batcher=batcher,
        counters=counters,
        limits=limits,
        max_requests=max_connections,
        token=token,
    )
    config = uvicorn.Config(
        build_app(pages),
        host=host,
        port=port,
        http=Connection,
        ws="none",
        log_level="warning",
        access_log=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=idle_seconds,
        timeout_graceful_shutdown=max(int(shutdown_seconds), 1),
    )
    socket = config.bind_socket()
    print(
        f"serving {name} on http://{host}:{socket.getsockname()[1]}/score (device {place})",
        flush=True,
    )
    uvicorn.Server(config).run(sockets=[socket])
