"""Stopping after the running iteration, in all processes: on Ctrl-C, and on SIGTERM, as before Slurm's time limit."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer

from flowrl.modules.measures import gather
from flowrl.modules.parallel import is_later_rank

NOTICE = b"\nstopping after this iteration, with a checkpoint; Ctrl-C again stops at once\n"


class Stop(Callback):
    """Remembers that SIGTERM came, or a first Ctrl-C once iterations have begun; a second one stops at once.

    Must stand before callbacks that work long in `on_train_start`. It replaces Lightning's own answer, which
    broadcasts from within the signal handler: one process may do so while another waits in a different collective, and
    both hang.
    """

    def __init__(self) -> None:
        self.has_signal = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._remember)  # Lightning restores the one before at the end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # A run in a script's background ignores Ctrl-C, and goes on doing so.
        is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if not batch_idx and not is_ignored and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.has_signal = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if not is_later_rank():
                os.write(2, NOTICE)  # printing is not safe within a handler

    def is_asked_for(self) -> bool:
        """Whether any process has had the signal: to be called by all of them at the same point."""
        return any(gather(self.has_signal))
