"""Runs a reward's server until it is told to stop."""

from __future__ import annotations

import logging
import os

import torch
import uvicorn

from flowrl.errors import UserError
from flowrl.modules.reward import RewardModule
from flowrl.rewards.protocol import Reward
from flowrl.serving.app import Limits, Pages, build_app
from flowrl.serving.batcher import Batcher
from flowrl.serving.counters import Counters

log = logging.getLogger(__name__)


def serve(
    reward: Reward,
    *,
    host: str,
    port: int,
    device: str,
    limits: Limits,
    max_batch: int,
    max_wait: float,
    max_waiting: int,
    max_connections: int,
    shutdown_seconds: float,
    token_env: str | None,
) -> None:
    """Serve `reward` at `host`:`port` until SIGINT or SIGTERM.

    Requests under way are then finished, within `shutdown_seconds`.
    `device` is `auto` (CUDA where there is any) or a torch device. `token_env` names the environment variable with the
    bearer token that /score asks for. Port 0 takes a free one; the line that announces the server names it.
    """
    for name, value in {"max_batch": max_batch, "max_waiting": max_waiting, "max_connections": max_connections}.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if limits.max_images > max_waiting:
        raise UserError(f"limits.max_images={limits.max_images} must be at most max_waiting={max_waiting}; lower it")
    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise UserError(f"token_env={token_env}: set the environment variable {token_env} to the token")
    if token is None and host not in ("localhost", "127.0.0.1", "::1"):
        log.warning("host=%s without token_env: whoever reaches the port can use the scorer", host)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    module = RewardModule(reward=reward, max_missing=1.0).to(place)
    counters = Counters()
    batcher = Batcher(
        lambda images, prompts: module.score(images.to(place), prompts),
        max_batch=max_batch,
        max_wait=max_wait,
        max_waiting=max_waiting,
        counters=counters,
    )
    name = type(reward).__name__
    app = build_app(Pages(name=name, batcher=batcher, counters=counters, limits=limits, token=token))
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=max(int(shutdown_seconds), 1),
    )
    socket = config.bind_socket()
    print(f"serving {name} on http://{host}:{socket.getsockname()[1]}/score (device {place})", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
