"""A reward's server runs until it is told to stop."""

from __future__ import annotations

import logging
import os

import torch
import uvicorn

from flowrl.errors import UserError
from flowrl.rewards.client import LOCAL
from flowrl.rewards.protocol import Reward, asks_for_whole_clips, asks_for_whole_groups
from flowrl.serving.app import Limits, Pages, at_most, build_app
from flowrl.serving.batcher import Batcher
from flowrl.serving.connections import settings_for
from flowrl.serving.counters import Counters
from flowrl.serving.listening import bind
from flowrl.training.reward import RewardModule
from flowrl.values.bounds import Bytes, Count, Seconds
from flowrl.values.check import checked

log = logging.getLogger(__name__)


@checked("")
def serve(
    reward: Reward,
    *,
    host: str,
    port: int,
    device: str,
    limits: Limits,
    max_batch: Count,
    max_batch_bytes: Bytes,
    max_wait: Seconds,
    max_waiting: Count,
    max_waiting_bytes: Bytes,
    max_connections: Count,
    idle_seconds: Count,
    shutdown_seconds: Count,
    token_env: str | None,
) -> None:
    """Serve `reward` at `host`:`port` until SIGINT or SIGTERM.

    - Port 0 takes a free one; the line that announces the server names it.
    - `device` is `auto` (CUDA where there is any) or a torch device.
    - `limits` are those on one request, and `max_batch` to `max_waiting_bytes` those of `Batcher`.
    - Up to `max_connections` requests are under way at a time, and as many connections may wait for
      one, each for `idle_seconds`.
    - Requests under way when it ends are finished, within `shutdown_seconds`.
    - `token_env` names the environment variable with the bearer token that /score asks for.

    Raises UserError for limits that contradict each other, a variable that is not set, and a
    port that is taken.
    """
    at_most("max_images", limits.max_images, "max_waiting", max_waiting)
    at_most("max_image_bytes", limits.max_image_bytes, "max_batch_bytes", max_batch_bytes)
    at_most("max_decoded_bytes", limits.max_decoded_bytes, "max_waiting_bytes", max_waiting_bytes)
    token = _read_token(token_env)
    if token is None and host not in LOCAL:
        log.warning("host=%s without token_env: whoever reaches the port can use the scorer", host)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if asks_for_whole_groups(reward):
        raise UserError(
            f"reward: {type(reward).__name__} compares the images of a prompt, and requests are "
            "batched without regard to prompts; use it in the run's own process"
        )
    if asks_for_whole_clips(reward):
        raise UserError(
            f"reward: {type(reward).__name__} takes whole clips, and requests carry images; use it "
            "in the run's own process"
        )
    place = torch.device(device)
    # Missing samples are told to the client, which decides how many are too many.
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
    config = settings_for(
        build_app(pages),
        host=host,
        port=port,
        max_connections=max_connections,
        idle_seconds=idle_seconds,
        shutdown_seconds=shutdown_seconds,
    )
    # Bound before it is announced, so that port 0 is known, and whoever reads the line can connect.
    listening = bind(host, port)
    bound_port = listening.getsockname()[1]
    print(f"serving {name} on http://{host}:{bound_port}/score (device {place})", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def _read_token(token_env: str | None) -> str | None:
    """Return the bearer token, None where none is asked for. Raises UserError where it is not
    set.
    """
    if not token_env:
        return None
    token = os.environ.get(token_env)
    if not token:
        raise UserError(
            f"token_env={token_env}: set the environment variable {token_env} to the token"
        )
    return token
