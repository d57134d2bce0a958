"""Stopping on SIGTERM, as Slurm sends it before a time limit: after the running iteration, in all processes."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from lightning import Callback, LightningModule, Trainer

from flowrl.modules.measures import gather


class Stop(Callback):
    """Remembers that SIGTERM came. Must stand before callbacks that work long in `on_train_start`.

    It replaces Lightning's own answer, which broadcasts from within the signal handler: one process may do so while
    another waits in a different collective, and both hang.
    """

    def __init__(self) -> None:
        self.has_signal = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._remember)  # Lightning restores the one before at the end

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.has_signal = True

    def is_asked_for(self) -> bool:
        """Whether any process has had the signal: to be called by all of them at the same point."""
        return any(gather(self.has_signal))
