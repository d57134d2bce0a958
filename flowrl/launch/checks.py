"""Rules between parts of the configuration, checked before anything is built; each names the keys that it is about."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.sweep.job import num_ranks


def check_guidance(cfg: DictConfig) -> None:
    """Guidance needs a model that encodes negative prompts. Raises ValueError naming both keys."""
    scales = {
        "rollout.guidance_scale": cfg.rollout.guidance_scale,
        "evaluation.guidance_scale": cfg.evaluation.guidance_scale,
        "penalty.guidance_scale": cfg.penalty.guidance_scale,
    }
    for name, scale in scales.items():
        if scale != 1 and not cfg.model.has_guidance:
            raise UserError(f"{name}={scale} needs model.has_guidance=true; 1.0 means no guidance")


def check_deadlines(cfg: DictConfig) -> None:
    """Other processes wait in a collective for the one whose scores are late. Raises ValueError naming both keys.

    Until its circuit opens, a service that hangs may cost `open_after` calls, each up to its deadline; those of a
    mixture are asked one after the other.
    """
    strategy = cfg.trainer.get("strategy")
    minutes = strategy.get("timeout_minutes") if OmegaConf.is_dict(strategy) else None
    if minutes is None:
        return
    limit = 60 * minutes
    clients = dict(_clients(OmegaConf.to_container(cfg.reward, resolve=True), "reward"))
    if sum(client["open_after"] * client["deadline"] for client in clients.values()) >= limit:
        each = [
            f"{name}.deadline={c['deadline']:g} seconds x open_after={c['open_after']}" for name, c in clients.items()
        ]
        raise UserError(
            f"{' + '.join(each)} must stay below trainer.strategy.timeout_minutes={minutes:g} ({limit:g} seconds), "
            "after which the other processes give up: lower the former, or raise the latter"
        )
    seconds = cfg.get("scorer_timeout")
    if seconds is not None and seconds >= limit:
        raise UserError(
            f"scorer_timeout={seconds:g} seconds must stay below trainer.strategy.timeout_minutes={minutes:g} "
            f"({limit:g} seconds), after which the other processes give up: lower the former, or raise the latter"
        )


def _clients(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings below `node` of what asks a service, with their keys."""
    if isinstance(node, dict):
        if "deadline" in node:
            yield name, node
        for key, child in node.items():
            yield from _clients(child, f"{name}.{key}")


def check_trainer(cfg: DictConfig) -> None:
    """How a run may be spread and rounded. Raises ValueError naming both keys."""
    if str(cfg.trainer.get("precision")) not in ("None", "32", "32-true"):
        raise UserError(
            f"trainer.precision={cfg.trainer.precision} rounds the trained weights, or keeps casts of them that later "
            "updates of an iteration do not see; take model.dtype=bfloat16, whose LoRA stays float32"
        )
    if cfg.model.dtype == "float16":
        raise UserError(
            "model.dtype=float16 cannot be trained: gradients of mean-reduced log-probabilities are below its smallest "
            "number; take bfloat16"
        )
    if OmegaConf.select(cfg, "trainer.strategy._target_") == "flowrl.modules.parallel.parts":
        if cfg.tuning._target_ != "flowrl.models.full.Full":
            raise UserError("trainer=fsdp is for tuning=full, whose weights it divides; for LoRA take trainer=ddp")
        devices, num_nodes = cfg.trainer.devices, cfg.trainer.num_nodes
        # How many `auto` and -1 are is known later.
        if devices not in ("auto", -1) and num_ranks(devices) * num_nodes != cfg.batch.num_processes:
            raise UserError(
                f"trainer.devices={devices} and trainer.num_nodes={num_nodes} with trainer=fsdp need "
                f"batch.num_processes={num_ranks(devices) * num_nodes}"
            )
        if cfg.backend.compile:
            raise UserError("trainer=fsdp does not go with backend.compile=true; set it to false")
