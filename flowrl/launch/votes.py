"""The folder of votes of a run, which its configuration leaves open, since run folders move."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flowrl.votes.files import FOLDER, read_votes

TARGET = "flowrl.rewards.votes.Votes"


def with_folder(cfg: DictConfig, run: Path) -> DictConfig:
    """Return the configuration of a run in the folder `run`, whose votes lie in it unless it names
    another place.
    """
    if not any(True for _ in _without_folder(cfg.reward)):
        return cfg
    changed = copy.deepcopy(cfg)
    for node in _without_folder(changed.reward):
        node.folder = str(run.absolute() / FOLDER)
    return changed


def with_votes_of(cfg: DictConfig, run: Path) -> DictConfig:
    """Return a configuration that scores by the votes of a run as they are now, by their number:
    an evaluation that goes on later is not to mix two scores.
    """
    changed = with_folder(cfg, run)
    for node in _votes(changed.reward):
        if node.get("lines") is None and node.folder is not None:
            node.lines = read_votes(Path(node.folder).expanduser()).num_lines
    return changed


def _without_folder(reward: Any) -> Iterator[DictConfig]:
    return (node for node in _votes(reward) if node.get("folder") is None)


def _votes(node: Any) -> Iterator[DictConfig]:
    """Yield the nodes of rewards that are votes, at any depth."""
    if not OmegaConf.is_dict(node):
        return
    if node.get("_target_") == TARGET:
        yield node
    for key in node:
        if not OmegaConf.is_missing(node, key):
            yield from _votes(node[key])
