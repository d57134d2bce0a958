"""The progress bar: iterations, time, and this loop's numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from flowrl.training.policy import Policy
from flowrl.training.prompt_data import PromptBatch, PromptData

LINE_SECONDS = 30.0
"""The time between two lines, where there is no terminal to draw a bar on."""

COLUMNS = 80
"""The columns of a terminal that nobody has widened."""

INDENT = "  "

SHOWN = {
    "reward": "reward/mean",
    "kl": "trust/kl_old",
    "masked": "trust/masked_fraction",
    "img/s": "perf/images_per_second",
}
"""Metrics that the bar shows, by their labels there."""


def is_terminal() -> bool:
    """Tell whether a bar can be drawn over itself where the program prints."""
    return sys.stdout.isatty()


class Progress(TQDMProgressBar):
    """Lightning's bar with a few of this loop's metrics; it fits 80 columns.

    It counts the iterations of the run, so that a resumed one goes on where it stopped. In a file
    or a pipe, where a bar would leave its carriage returns, it prints a line now and then instead.
    """

    next_line = 0.0

    @property
    def is_disabled(self) -> bool:
        """True where no bar is drawn."""
        return super().is_disabled or not is_terminal()

    @property
    def has_lines(self) -> bool:
        """True where lines stand for the bar."""
        return self.is_enabled and not is_terminal()

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print a text above the bar, or as it is where there is none."""
        if self.has_lines:
            print(*args, sep=sep, flush=True)
        else:
            super().print(*args, sep=sep, **kwargs)

    def tell(self, text: str, *, is_due: bool = False) -> None:
        """Print a line in place of the bar, unless the last one was just now and it is not due."""
        now = time.monotonic()
        if is_due or now >= self.next_line:
            self.print(text)
            self.next_line = now + LINE_SECONDS

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
        if self.has_lines:
            yield self.tell
            return
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
        if self.has_lines:
            done = batch.iteration + 1
            total = self.total_train_batches
            figures = self.get_metrics(trainer, pl_module).items()
            words = [f"{name}={_short(value)}" for name, value in figures]
            is_due = done in (self._data.start_iteration + 1, total)
            self.tell(f"iteration {done} of {total}: {', '.join(words)}", is_due=is_due)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the newest of the metrics that are shown, by their labels."""
        # Lightning's own way here, `log_dict`, takes milliseconds of every iteration.
        metrics = cast(Policy, pl_module).last_metrics
        return {label: metrics[name] for label, name in SHOWN.items() if name in metrics}


def _short(value: object) -> str:
    """Return a number by its first digits; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def in_lines(items: Sequence[str]) -> str:
    """Return a list in lines of at most COLUMNS characters, in which no item is divided."""
    lines = [""]
    for i, item in enumerate(items):
        word = item if i == len(items) - 1 else f"{item},"
        if lines[-1] and len(f"{INDENT}{lines[-1]} {word}") > COLUMNS:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return "\n".join(f"{INDENT}{line}" for line in lines)
