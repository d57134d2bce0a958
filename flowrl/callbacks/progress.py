"""The progress bar: iterations, time, and this loop's numbers."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from flowrl.training.prompt_data import PromptBatch, PromptData


class Progress(TQDMProgressBar):
    """Lightning's bar with this loop's metrics alone, without the tracker's run id; it fits 80
    columns.

    It counts the iterations of the run, so that a resumed one goes on where it stopped.
    """

    BAR_FORMAT = "{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    @property
    def total_train_batches(self) -> int:
        """Return the number of all iterations of the run."""
        return len(self._data.iterations)

    @property
    def _data(self) -> PromptData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Begin at the first iteration that is left."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.initial = self.train_progress_bar.n = self._data.start_iteration

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
    ) -> None:
        """Count an iteration more."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch.iteration)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return {
            name: value
            for name, value in super().get_metrics(trainer, pl_module).items()
            if name != "v_num"
        }
