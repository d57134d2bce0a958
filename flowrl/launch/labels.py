"""The labels by which trackers tell runs apart: the condition, the sweep, and the options that were
chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.launch.foreign_targets import parse
from flowrl.launch.harmless import is_harmless, leaves, lies_in
from flowrl.runs.command_line import escape, key_of
from flowrl.runs.secrets import is_secret

HYDRAS = "multirun.yaml"
"""The file that Hydra writes into the folder of any sweep, before it looks at its overrides."""

LENGTH = 80
"""Characters of a condition, without those that stand for its configuration."""

NAMED = ("model", "sampler", "loss")
"""The groups whose options are words of a run's default name."""


def fill(cfg: DictConfig, hydra: Any, sweep: Path | None = None) -> None:
    """Give a configuration, whose `${hydra:...}` are frozen, the labels that it leaves null.

    `sweep` is the folder of the sweep that it is a job of.

    That of a private script may lack the keys.
    """
    if cfg.get("choices", "") is None:
        cfg.choices = choices_of(hydra)
    if sweep is not None and cfg.get("sweep", "") is None:
        cfg.sweep = sweep.name
    if cfg.get("condition", "") is None:
        overrides = list(hydra.overrides.task)
        swept = swept_keys(sweep) if sweep is not None else set()
        if swept:
            overrides = [override for override in overrides if _key(override) in swept]
        cfg.condition = condition(cfg, overrides)


def choices_of(hydra: Any) -> dict[str, str]:
    """Return the option that each group of the configuration took, without Hydra's own groups."""
    choices = hydra.runtime.choices.items()
    return {key: option for key, option in choices if option is not None and "hydra/" not in key}


def condition(cfg: DictConfig, overrides: Sequence[str]) -> str:
    """Name what a run has in common with those that differ from it in their seed alone.

    The name ends in characters that stand for all that decides its numbers. Two runs of one name
    are therefore alike, whatever their overrides leave unsaid.
    """
    name = str(cfg.get("name", "run"))
    words = [name]
    for override in overrides:
        key = _key(override)
        is_named = key in NAMED and override.partition("=")[2] in name.split("-")
        # It is shown, published and compared by whoever reads the run.
        is_private = is_secret(key) or "://" in override
        if key != "seed" and not (is_named or is_private or is_harmless(key)):
            words.append(override.lstrip("+"))
    return escape(f"{' '.join(words)[:LENGTH]} #{_digest(cfg)}")


def _digest(cfg: DictConfig) -> str:
    """Return six characters that stand for the keys which decide a run's numbers, but its seed."""
    values = leaves(OmegaConf.to_container(cfg, resolve=False))
    material = {key: value for key, value in values if key != "seed" and not is_harmless(key)}
    text = json.dumps(material, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def swept_keys(folder: Path) -> set[str]:
    """Return the keys that the sweep in `folder` varies; none where its file does not tell."""
    try:
        hydra = OmegaConf.load(folder / HYDRAS).hydra
        overrides = parse([str(item) for item in hydra.overrides.task])
        params = hydra.sweeper.get("params") or {}
    except (OSError, yaml.YAMLError, OmegaConfBaseException, AttributeError):
        return set()
    swept = {item.key_or_group for item in overrides if item.is_sweep_override()}
    return swept | {key_of(str(key)) for key in params}


def _key(override: str) -> str:
    return key_of(override.lstrip("~"))


def columns(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration for trackers, in which each value stands once.

    Nodes that are another node's are left out, and so is all that `algorithm` gathers from other
    keys. A single value that follows another key stays, since a run may override it: `loss.delta`.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    return _without_copies(raw, resolved, "")


def _without_copies(raw: dict[Any, Any], resolved: dict[Any, Any], prefix: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in resolved.items():
        name = f"{prefix}{key}"
        is_reference = isinstance(raw[key], str) and raw[key].startswith("${")
        if is_reference and (isinstance(value, dict) or lies_in(name, "algorithm")):
            continue
        if isinstance(raw[key], dict):
            value = _without_copies(raw[key], value, f"{name}.")
        kept[str(key)] = value
    return kept
