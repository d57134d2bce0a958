"""The training of some iterations, after which others may follow: what a trainer would forget."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from flowrl.runs.checkpoint import load_optimizer_tensors, optimizer_tensors
from flowrl.training.policy import Policy


class Iterate(Callback):
    """The callback that keeps metrics, takes the optimizer's state from one trainer to the next,
    and ends after the running iteration on Ctrl-C.
    """

    def __init__(self) -> None:
        self.optimizer: dict[str, Tensor] | None = None
        self.rows: list[dict[str, float]] = []
        self.tell: Callable[[Mapping[str, float]], None] | None = None
        self.is_interrupted = False

    def begin(self, tell: Callable[[Mapping[str, float]], None] | None) -> None:
        """Prepare for the next trainer."""
        self.rows = []
        self.tell = tell
        self.is_interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.optimizer is not None:
            load_optimizer_tensors(trainer.optimizers[0], self.optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        row = dict(pl_module.last_metrics)
        self.rows.append(row)
        self.optimizer = optimizer_tensors(trainer.optimizers[0])
        if self.tell is not None:
            self.tell(row)
        if self.is_interrupted:
            trainer.should_stop = True

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Let the running iteration end after a first Ctrl-C; a second one raises KeyboardInterrupt
        at once.

        Lightning would end the process, and ignore every later Ctrl-C of a notebook.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield
        except SystemExit as error:
            raise KeyboardInterrupt from error
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True
