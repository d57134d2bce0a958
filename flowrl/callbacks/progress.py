"""The progress bar: iterations, time, and this loop's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

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

    def init_train_tqdm(self) -> Tqdm:
        """Make the bar with the number of iterations, which Lightning learns later."""
        bar = super().init_train_tqdm()
        # Without these, a bar that is drawn before the first iteration shows no end.
        bar.total = self.total_train_batches
        bar.initial = bar.n = self._data.start_iteration
        bar.refresh()
        return bar

    @contextmanager
    def in_words(self) -> Iterator[Callable[[str], None]]:
        """Give a function that shows a text in place of the bar, which comes back afterwards."""
        bar = self._train_progress_bar
        if bar is None or bar.disable:  # in a later process, or after the last iteration
            yield lambda text: None
            return
        form = bar.bar_format
        bar.bar_format = "{desc}"
        try:
            yield bar.set_description_str
        finally:
            bar.bar_format = form
            bar.set_description_str("", refresh=False)

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
        """Return Lightning's metrics without `v_num`, its name for the tracker's run id."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
