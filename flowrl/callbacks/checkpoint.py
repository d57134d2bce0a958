"""Saving the policy every few iterations, restoring it on resume, exporting the LoRA at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from flowrl import checkpoint
from flowrl.callbacks.record import RunRecord
from flowrl.models import lora
from flowrl.modules.policy import Policy

log = logging.getLogger(__name__)


class Checkpoint(Callback):
    """Writes `checkpoints/<iteration>` every `every` iterations and keeps the newest `keep`.

    At the end of training the EMA weights go to `lora/`, in the format of the stock pipeline's `load_lora_weights`.
    """

    def __init__(self, *, record: RunRecord, folder: str, every: int, keep: int) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"checkpoint.every={every} and checkpoint.keep={keep} must be at least 1")
        self.record, self.folder, self.every, self.keep = record, Path(folder), every, keep
        self.restored: Path | None = None

    def resume_from(self, policy: Policy) -> int:
        """Load the newest complete checkpoint's weights and counters, 0 iterations if there is none."""
        complete = checkpoint.list_complete(self.folder / "checkpoints")
        if not complete:
            return 0
        self.restored = complete[-1]
        weights, state = checkpoint.load(self.restored)
        lora.load(policy.transformer, weights["lora"])
        policy.ema.weights = weights["ema"]
        policy.num_iterations = state["num_iterations"]
        policy.num_optimizer_steps = state["num_optimizer_steps"]
        self.record.restore(policy.num_iterations, state["record"])
        return policy.num_iterations

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        pl_module.ema.weights = {name: value.to(pl_module.device) for name, value in pl_module.ema.weights.items()}
        if self.restored is not None:
            weights, _ = checkpoint.load(self.restored)
            checkpoint.load_optimizer_tensors(trainer.optimizers[0], weights["optimizer"])
            torch.set_rng_state(weights["rng"]["state"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        is_last = pl_module.num_iterations == len(trainer.datamodule.iterations)  # type: ignore[attr-defined]
        if is_last or pl_module.num_iterations % self.every == 0:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, policy: Policy) -> None:
        if trainer.is_global_zero:
            checkpoint.save(
                self.folder / "checkpoints",
                keep=self.keep,
                weights={
                    "lora": lora.parameters(policy.transformer),
                    "ema": policy.ema.weights,
                    "optimizer": checkpoint.optimizer_tensors(trainer.optimizers[0]),
                    "rng": {"state": torch.get_rng_state()},
                },
                state=policy.state() | {"record": self.record.state()},
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        if trainer.interrupted or not trainer.is_global_zero:
            return
        with lora.swapped(pl_module.transformer, pl_module.ema.weights):
            pl_module.model.save_lora(self.folder / "lora")
