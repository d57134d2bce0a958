"""Stopping after the running iteration, in all processes: on Ctrl-C, and on SIGTERM, as before
Slurm's time limit.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer

from flowrl.parallel import background
from flowrl.parallel.collectives import gather
from flowrl.parallel.strategies import is_later_rank
from flowrl.training.policy import Policy
from flowrl.training.reward import RewardModule

NOTICE = "stopping after this iteration, with a checkpoint"
REPEATED = 1.0
"""Seconds within which further signals are the first one's echo: a launcher forwards what its whole
group has had.
"""


def is_at_end(trainer: Trainer, policy: Policy) -> bool:
    """Tell whether the run's last iteration is over."""
    return policy.num_iterations == len(trainer.datamodule.iterations)  # type: ignore[attr-defined]


class Stop(Callback):
    """Remember that SIGTERM came, or a first Ctrl-C once iterations have begun, and say what is
    waited for.

    A second Ctrl-C stops at once, and so does a second SIGTERM while the run waits for a scorer.

    Must stand before callbacks that work long in `on_train_start`. It replaces Lightning's own
    answer, which broadcasts from within the signal handler: one process may do so while another
    waits in a different collective, and both hang.
    """

    def __init__(self) -> None:
        self.has_signal = False
        self.since = 0.0
        self.reward: RewardModule | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reward = getattr(pl_module, "reward", None)
        if threading.current_thread() is threading.main_thread():
            # Lightning restores the one before at the end.
            signal.signal(signal.SIGTERM, self._remember)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # A run in a script's background ignores Ctrl-C, and goes on doing so.
        is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        is_main = threading.current_thread() is threading.main_thread()
        if not batch_idx and not is_ignored and is_main:
            signal.signal(signal.SIGINT, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Note that the signal `number` came, and tell the user what a second one would do."""
        waits_for = self.reward.waits_for() if self.reward is not None else None
        if self.has_signal and number == signal.SIGTERM:
            is_echo = time.monotonic() - self.since <= REPEATED
            if waits_for is not None and not is_echo:
                self._stop_at_once(number, frame)
            return
        self.has_signal = True
        self.since = time.monotonic()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._stop_at_once)
        # All processes have had the signal; one message is enough.
        if not is_later_rank():
            is_interrupt = number == signal.SIGINT
            again = "Ctrl-C again" if is_interrupt else "SIGTERM again, or Ctrl-C twice,"
            scorer = "" if waits_for is None else f"; waiting for {waits_for}"
            # Printing is not safe within a handler.
            os.write(2, f"\n{NOTICE}{scorer}; {again} stops at once\n".encode())

    def _stop_at_once(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, with nothing left to wait for."""
        # A scorer may hang for ever, and so hold up the end of the process.
        if self.reward is not None and self.reward.running is not None:
            background.give_up(self.reward.running)
        raise KeyboardInterrupt

    def is_asked_for(self) -> bool:
        """Tell whether any process has had the signal; all of them call it at the same point."""
        return any(gather(self.has_signal))
