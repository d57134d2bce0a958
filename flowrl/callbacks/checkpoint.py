"""The callback that saves the policy every few iterations, restores it on resume, and exports the
LoRA at the end.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import Stop, is_at_end
from flowrl.errors import UserError
from flowrl.models.weights import first_not_finite, require_finite
from flowrl.parallel.sharding import gathered
from flowrl.runs import checkpoint
from flowrl.runs.base_model import named_in_run
from flowrl.runs.files import CHECKPOINTS, CONFIG, read_yaml
from flowrl.runs.folder import point_latest_at
from flowrl.training.export import export_average
from flowrl.training.memory import OutOfMemory
from flowrl.training.policy import Policy
from flowrl.training.reward import TooManyMissingRewards
from flowrl.tuning.metadata import notes_of
from flowrl.values.bounds import Count
from flowrl.values.check import checked

log = logging.getLogger(__name__)

NO_CHECKPOINT = "no checkpoint yet"

STATE_KEYS: dict[str, type] = {"num_iterations": int, "num_optimizer_steps": int, "record": dict}
"""The keys that a checkpoint's state must hold to resume from, with their types; what belongs to
one method is that method's to ask for.
"""


class Checkpoint(Callback):
    """The callback that writes `checkpoints/<iteration>` every `every` iterations and keeps the
    newest `keep`.

    When a stop is asked for, it writes one after the running iteration and ends the run. With the
    first checkpoint that it writes `outputs/latest` moves to the run. `export` writes the EMA
    weights to `lora/`, in the format of the stock pipeline's `load_lora_weights`, or after full
    fine-tuning to `transformer/`, in that of the network's `from_pretrained`.
    """

    @checked("checkpoint")
    def __init__(
        self, *, record: RunRecord, stop: Stop, folder: str, every: Count, keep: Count
    ) -> None:
        self.record = record
        self.stop = stop
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.restored: Path | None = None
        self.is_whole = False
        self.has_moved_latest = False

    def resume_from(self, policy: Policy) -> int:
        """Load the newest whole checkpoint's weights and counters, 0 iterations if there is
        none.
        """
        newest = checkpoint.load_newest(self.folder / CHECKPOINTS, self.stems(policy), STATE_KEYS)
        if newest is None:
            self.record.start_anew()
            return 0
        self.restored, weights, state = newest
        labelled: dict[str, Tensor] = {}
        for stem, tensors in weights.items():
            labelled |= {f"{stem} {name}": tensor for name, tensor in tensors.items()}
        # Digests only tell that a file is as it was written.
        if name := first_not_finite(labelled):
            raise UserError(
                f"checkpoint {self.restored}: the weight {name} holds NaN or infinity; delete its "
                "folder to resume from the one before"
            )
        policy.load_weights(weights)
        policy.load_state(state)
        self.record.restore(policy.num_iterations, state["record"])
        return policy.num_iterations

    def stems(self, policy: Policy) -> list[str]:
        """List the files of weights that a checkpoint of the policy holds."""
        return [*policy.weights(), "optimizer", "rng"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        if trainer.is_global_zero and self.restored is not None:
            # Only now, since all processes have read theirs.
            checkpoint.set_aside_after(self.restored)
            checkpoint.remove_leftovers(self.folder / CHECKPOINTS)
        if self.restored is not None:
            # Read again, since the optimizer that takes its state back did not exist before.
            weights, _ = checkpoint.load(self.restored)
            checkpoint.load_optimizer_tensors(trainer.optimizers[0], weights["optimizer"])
            torch.set_rng_state(weights["rng"]["state"])
        self.is_whole = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        is_last = is_at_end(trainer, pl_module)
        # Asked of all processes, so that all of them stop after the same iteration.
        must_stop = self.stop.is_asked_for()
        if is_last or must_stop or pl_module.num_iterations % self.every == 0:
            self.save(trainer, pl_module)
        if must_stop and not is_last:
            # A process that ended sooner would have the one that saves killed.
            trainer.strategy.barrier()
            raise SIGTERMException

    def save(self, trainer: Trainer, policy: Policy) -> None:
        """Write a checkpoint. All processes call it: divided weights are gathered.

        Raises NotFinite, and leaves those that are there, where a weight is no number.
        """
        tensors = {
            **policy.weights(),
            "optimizer": checkpoint.optimizer_tensors(trainer.optimizers[0]),
            "rng": {"state": torch.get_rng_state()},
        }
        assert tensors.keys() == set(self.stems(policy))
        require_finite(tensors)  # before an older checkpoint is deleted for this one
        weights = {}
        for stem, named in tensors.items():
            weights[stem] = gathered(named, is_kept=trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        state = policy.state() | {"record": self.record.state()}
        checkpoint.save(
            self.folder / CHECKPOINTS,
            keep=self.keep,
            weights=weights,
            state=state,
        )
        # Only with a checkpoint is the run one to look at or to go on with.
        if not self.has_moved_latest:
            self.has_moved_latest = True
            point_latest_at(self.folder)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        assert isinstance(pl_module, Policy)
        # Rewards are checked before the first update of an iteration, so the state is that of the
        # last one's end, as it is where memory ran out before an update. Before the optimizer has
        # its state back, there is nothing to save that the checkpoint does not hold.
        is_between_updates = isinstance(exception, TooManyMissingRewards) or (
            isinstance(exception, OutOfMemory) and exception.is_between_updates
        )
        if is_between_updates and pl_module.num_iterations and self.is_whole:
            # An evaluation stopped it, before the row was written.
            if len(self.record.rows) < pl_module.num_iterations:
                self.record.on_train_batch_end(trainer, pl_module, None, None, 0)
            self.save(trainer, pl_module)

    def newest(self) -> str:
        """Say what a resumed run would start from."""
        complete = checkpoint.list_with_state(self.folder / CHECKPOINTS)
        if not complete:
            return NO_CHECKPOINT
        iteration = int(complete[-1].name)
        return f"the newest checkpoint is after iteration {iteration}"

    def export(self, trainer: Trainer, policy: Policy) -> None:
        """Write the EMA's weights, whole or not at all. All processes call it: divided weights are
        gathered.

        Raises NotFinite where a weight is no number.
        """
        notes = notes_of(named_in_run(self._config(), self.folder))
        export_average(policy, self.folder, notes, is_writer=trainer.is_global_zero)

    def _config(self) -> dict[str, Any]:
        """Read the run's configuration; nothing where it is gone or damaged by the end, which is no
        reason to lose what was learned.
        """
        path = self.folder / CONFIG
        try:
            return read_yaml(path, "restore it") if path.is_file() else {}
        except UserError as error:
            log.warning("%s; the exported LoRA does not say what it was trained on", error)
            return {}
