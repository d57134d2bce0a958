"""Rules between parts of the configuration, checked before anything is built; each names the keys
that it is about.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from flowrl.errors import UserError
from flowrl.losses.protocol import Loss
from flowrl.models.experts import networks_of
from flowrl.models.loading import EMBEDDED
from flowrl.runs.files import read_object
from flowrl.sweep.job import num_ranks
from flowrl.training import eight_bits
from flowrl.values.sizes import height_and_width

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "MASTER_ADDR", "NODE_RANK", "GROUP_RANK")
"""Variables by which whoever starts processes on several nodes tells them of each other."""

MAX_SAMPLES = 1_000_000


def check_rules(cfg: DictConfig) -> None:
    """Check all rules that the configuration alone decides."""
    check_guidance(cfg)
    check_deadlines(cfg)
    check_trainer(cfg)
    check_nodes(cfg)
    check_amounts(cfg)
    check_average(cfg)
    check_resolution(cfg)


def check_guidance(cfg: DictConfig) -> None:
    """Check that a model which is guided encodes negative prompts. Raises UserError naming both
    keys.
    """
    scales = {
        "rollout.guidance_scale": cfg.rollout.guidance_scale,
        # Runs from before there was the key train at the rollouts' scale.
        "rollout.training_guidance_scale": cfg.rollout.get("training_guidance_scale", 1),
        "evaluation.guidance_scale": cfg.evaluation.guidance_scale,
        "penalty.guidance_scale": cfg.penalty.guidance_scale,
    }
    for name, scale in scales.items():
        if scale != 1 and not cfg.model.has_guidance:
            raise UserError(f"{name}={scale} needs model.has_guidance=true; 1.0 means no guidance")


def check_deadlines(cfg: DictConfig) -> None:
    """Check that late scores come before other processes, which wait in a collective, give up.
    Raises UserError naming both keys.

    Until its circuit opens, a service that hangs may cost `open_after` calls, each up to its
    deadline; those of a mixture are asked one after the other.
    """
    strategy = cfg.trainer.get("strategy")
    minutes = strategy.get("timeout_minutes") if OmegaConf.is_dict(strategy) else None
    if minutes is None:
        return
    limit = 60 * minutes
    clients = dict(_clients(OmegaConf.to_container(cfg.reward, resolve=True), "reward"))
    bound = (
        f"must stay below trainer.strategy.timeout_minutes={minutes:g} ({limit:g} seconds), after "
        "which the other processes give up: lower the former, or raise the latter"
    )
    if sum(client["open_after"] * client["deadline"] for client in clients.values()) >= limit:
        terms = []
        for name, client in clients.items():
            deadline = client["deadline"]
            num_calls = client["open_after"]
            terms.append(f"{name}.deadline={deadline:g} seconds x open_after={num_calls}")
        raise UserError(f"{' + '.join(terms)} {bound}")
    seconds = cfg.get("scorer_timeout")
    if seconds is not None and seconds >= limit:
        raise UserError(f"scorer_timeout={seconds:g} seconds {bound}")


def _clients(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Walk the settings below `node` of what asks a service, with their keys."""
    if isinstance(node, dict):
        if "deadline" in node:
            yield name, node
        for key, child in node.items():
            yield from _clients(child, f"{name}.{key}")


def check_trainer(cfg: DictConfig) -> None:
    """Check how a run is spread over processes, and rounded. Raises UserError naming both keys."""
    if str(cfg.trainer.get("precision")) not in ("None", "32", "32-true"):
        raise UserError(
            f"trainer.precision={cfg.trainer.precision} rounds the trained weights, or keeps casts "
            "of them that later updates of an iteration do not see; take model.dtype=bfloat16, "
            "whose LoRA stays float32"
        )
    if cfg.model.dtype == "float16":
        raise UserError(
            "model.dtype=float16 cannot be trained: gradients of mean-reduced log-probabilities "
            "are below its smallest number; take bfloat16"
        )
    check_processes(cfg)
    if divides_weights(cfg):
        if cfg.backend.compile:
            raise UserError("trainer=fsdp does not go with backend.compile=true; set it to false")
        if has_8_bits(cfg):
            raise UserError(
                "trainer=fsdp does not go with optimizer=adamw_8bit, whose kernels take whole "
                "weights; set optimizer=adamw, whose state is divided"
            )
        quantization = cfg.model.get("quantization")
        if quantization is not None:
            raise UserError(
                f"trainer=fsdp does not go with model.quantization={quantization}; set it to null, "
                "or take trainer=ddp"
            )


def has_8_bits(cfg: DictConfig) -> bool:
    """Tell whether the optimizer is one of bitsandbytes'."""
    target = str(cfg.optimizer.get("_target_"))
    return target.startswith(("flowrl.training.eight_bits.", "bitsandbytes."))


def check_optimizer(cfg: DictConfig) -> None:
    """Check that the optimizer's package is installed. Raises UserError naming its extra."""
    if has_8_bits(cfg):
        eight_bits.require()


def divides_weights(cfg: DictConfig) -> bool:
    """Tell whether each process of the run holds a part of every weight."""
    return _strategy(cfg) == "flowrl.parallel.strategies.parts"


def has_replicas(cfg: DictConfig) -> bool:
    """Tell whether each of several processes holds all weights."""
    return _strategy(cfg) == "flowrl.parallel.strategies.replicas"


def _strategy(cfg: DictConfig) -> str | None:
    """Return the name of the function that makes the strategy, where one is configured."""
    target: str | None = OmegaConf.select(cfg, "trainer.strategy._target_")
    return target


def check_division(cfg: DictConfig, transformer: nn.Module) -> None:
    """Check that what is to be divided is one network, whose passes all processes make alike.
    Raises UserError naming the key.
    """
    num_networks = len(networks_of(transformer))
    if divides_weights(cfg) and num_networks > 1:
        raise UserError(
            f"trainer=fsdp divides one network, and the pipeline has {num_networks}; take "
            "trainer=ddp"
        )


def check_accelerator(cfg: DictConfig) -> None:
    """Check that this machine has the accelerator, before weights load. Raises UserError naming the
    key.
    """
    from lightning.pytorch.accelerators import AcceleratorRegistry

    accelerator = cfg.trainer.get("accelerator")
    # `auto` is no name of the registry, nor is a mistake, which Lightning answers.
    names = {"gpu": ("cuda", "mps")}.get(accelerator, (accelerator,))
    known = [name for name in names if name in AcceleratorRegistry]
    classes = [AcceleratorRegistry[name]["accelerator"] for name in known]
    if known and not any(kind.is_available() for kind in classes):
        raise UserError(
            f"trainer.accelerator={accelerator}: none is found on this machine; take cpu or auto"
        )


def emulation(device: torch.device, dtype: str) -> str | None:
    """Say in a line that a GPU computes the model's bfloat16 by way of float32; None where it does
    not.

    Such are GPUs older than NVIDIA's Ampere, as T4 and V100: they save the memory, and take
    several times as long.
    """
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return (
        f"{torch.cuda.get_device_name(device)} only emulates model.dtype=bfloat16, which saves "
        "memory and is several times slower than on a GPU that computes in it (Ampere or newer)"
    )


def check_processes(cfg: DictConfig) -> None:
    """Check that devices times nodes are the processes of the batch plan. Raises UserError naming
    all three keys.
    """
    devices = cfg.trainer.devices
    num_nodes = cfg.trainer.num_nodes
    # How many `auto` and -1 are is known later.
    if devices in ("auto", -1):
        return
    num_processes = num_ranks(devices) * num_nodes
    if num_processes != cfg.batch.num_processes:
        raise UserError(
            f"trainer.devices={devices} and trainer.num_nodes={num_nodes} need "
            f"batch.num_processes={num_processes}, not {cfg.batch.num_processes}"
        )


def check_nodes(cfg: DictConfig) -> None:
    """Check that something starts the processes on other nodes, which are waited for. Raises
    UserError naming the key.
    """
    num_nodes = cfg.trainer.num_nodes
    if num_nodes > 1 and not any(name in os.environ for name in LAUNCHERS):
        raise UserError(
            f"trainer.num_nodes={num_nodes} would wait for processes on other nodes, which nothing "
            "starts: start train.py on each by torchrun or srun, or set MASTER_ADDR, MASTER_PORT "
            "and NODE_RANK"
        )


def check_amounts(cfg: DictConfig) -> None:
    """Check that an iteration's samples, and the candidates of scouting, stay within what can be
    held. Raises UserError naming the keys.
    """
    plan = cfg.batch
    amounts = {"batch.group_size": plan.group_size}
    # Runs of earlier versions have no such key, and a choice of one's own may have other options.
    candidates = OmegaConf.select(cfg, "scouting.candidates")
    if isinstance(candidates, int):
        amounts["scouting.candidates"] = candidates
    for key, amount in amounts.items():
        count = plan.prompts_per_iteration * amount
        if count > MAX_SAMPLES:
            raise UserError(
                f"batch.prompts_per_iteration={plan.prompts_per_iteration} x {key}={amount} are "
                f"{count} samples an iteration, more than the {MAX_SAMPLES} that are held at once; "
                "lower one of them"
            )


def check_average(cfg: DictConfig) -> None:
    """Check that the average of the weights, which is exported, takes in at least one update.
    Raises UserError naming the key.
    """
    plan = cfg.batch
    steps = cfg.num_iterations * plan.updates_per_iteration * plan.inner_epochs
    if cfg.ema.every > steps:
        raise UserError(
            f"ema.every={cfg.ema.every} is more than the run's {steps} optimizer steps "
            f"(num_iterations={cfg.num_iterations}), so that the average, which is evaluated and "
            "exported, would stay at the start; lower ema.every"
        )


def check_floor(cfg: DictConfig, loss: Loss) -> None:
    """Check that a threshold above the rounding floor has a mask that looks at it. Raises UserError
    naming both keys.
    """
    # Runs of earlier versions have no such key.
    if not cfg.trust.get("above_floor"):
        return
    if getattr(loss, "kl_threshold", None) is None:
        raise UserError(
            f"trust.above_floor=true is for a mask on the KL, which loss={loss.name} as configured "
            "has not: choose loss=dppo loss.divergence=kl, or set trust.above_floor=false"
        )
    if cfg.loss.get("delta") == "auto":
        raise UserError(
            "trust.above_floor=true with loss.delta=auto: the budget is one of the whole KL, floor "
            "included; give loss.delta a number, or set trust.above_floor=false"
        )


def check_resolution(cfg: DictConfig) -> None:
    """Check that images have the one size that an embedded pipeline draws. Raises UserError naming
    it.
    """
    name = cfg.model.pretrained
    folder = Path(str(files("flowrl.shapes")), "assets", name.removeprefix(EMBEDDED))
    path = folder / "vae" / "config.json"
    if not name.startswith(EMBEDDED) or not path.is_file():
        return
    if "resolution" not in cfg.model:
        return  # the size of model=derived is in model.call, where its pipeline looks at it
    side = read_object(path, "install FlowRL again")["sample_size"]
    if height_and_width(cfg.model.resolution) != (side, side):
        raise UserError(
            f"model.resolution={cfg.model.resolution} must be {side}: model.pretrained={name} "
            "draws no other size"
        )
