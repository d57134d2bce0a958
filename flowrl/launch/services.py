"""The asking of the services that a reward needs, before anything heavy is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.parallel.strategies import is_later_rank
from flowrl.rewards.client import Client, Unavailable, Unfit

PAUSE = 0.5
"""Seconds between two tries."""


@runtime_checkable
class Service(Protocol):
    """A part of a reward that asks a server; `examine` raises Unavailable or Unfit unless that is
    there and right.
    """

    client: Client

    def examine(self) -> None: ...


def check_services(reward: DictConfig) -> None:
    """Ask every service below the configuration node `reward` whether it is there and what was
    meant.

    For one that is not there yet, `client.start_seconds` are waited, with a line that says so.
    Raises UserError with the key to look at. The first process asks for all.
    """
    if is_later_rank():
        return
    for key, node in _nodes(reward, "reward"):
        # A service of its own, for this question alone; the run's is built with its reward.
        service = instantiate(node)
        assert isinstance(service, Service)
        if service.client.start_seconds is not None:
            _wait_for(service, key, str(node.url), service.client.start_seconds)


def _nodes(node: Any, key: str) -> Iterator[tuple[str, DictConfig]]:
    """Walk the nodes of services, with their keys; they are built alone, since what holds them may
    load weights.
    """
    if not OmegaConf.is_dict(node):
        return
    target = node.get("_target_")
    if target is not None and "url" in node and hasattr(get_object(target), "examine"):
        yield key, node
    for name in node:
        if not OmegaConf.is_missing(node, name):
            yield from _nodes(node[name], f"{key}.{name}")


def _wait_for(service: Service, key: str, url: str, seconds: float) -> None:
    """Return once the service at `key` is there. Raises UserError after `seconds`, or at once for
    one that is another than was meant.
    """
    until = time.monotonic() + seconds
    is_told = False
    while True:
        try:
            return service.examine()
        except Unfit as error:
            raise UserError(f"{key}.url={url}: {error}; look at {key}.{error.setting}") from error
        except Unavailable as error:
            if time.monotonic() >= until:
                raise UserError(
                    f"{key}.url={url}: no server there ({error}); start it, or mend the address. A "
                    "server that starts later is waited for with "
                    f"{key}.client.start_seconds={max(2 * seconds, 60):g} or more"
                ) from error
            if not is_told:
                print(
                    f"{key}.url={url}: {error}; waiting up to {seconds:g} s for the server",
                    flush=True,
                )
                is_told = True
            time.sleep(min(PAUSE, max(until - time.monotonic(), 0)))
