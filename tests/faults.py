"""What goes wrong in a job, on order: callbacks and a scorer for `train.py`, which finds them by
PYTHONPATH.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from lightning import Callback

from flowrl.rewards.shapes import ShapesReward


class Fault(Callback):
    """After its second iteration the last rank of the job with seed `crash` raises, and that of
    `kill` is killed.

    Not in a resumed run.
    """

    def __init__(self, *, crash, kill):
        self.crash, self.kill = crash, kill

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        is_due = batch_idx == 1 and trainer.datamodule.start_iteration == 0
        if not is_due or trainer.global_rank != trainer.world_size - 1:
            return
        if pl_module.seed == self.crash:
            raise RuntimeError("ordered by the test")
        if pl_module.seed == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


class Impossible(Callback):
    """Asks of the gate what no replay can give."""

    def on_train_start(self, trainer, pl_module):
        objective = pl_module.objective
        objective.context = replace(objective.context, gate_tolerance=-1.0)


class Poison(Callback):
    """Makes a trained weight, or an averaged one, NaN after iteration number `after`. Not in a
    resumed run.
    """

    def __init__(self, *, after, kind):
        self.after, self.kind = after, kind

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.num_iterations == self.after and trainer.datamodule.start_iteration == 0:
            with torch.no_grad():
                list(pl_module.weights()[self.kind].values())[5].view(-1)[1] = torch.nan


class Failing:
    """Scores nothing."""

    def __call__(self, images, prompts):
        raise RuntimeError("no scores today")


class Hanging:
    """Scores like the shapes' verifier, but the process of rank `rank` hangs for minutes in its
    `call`th call.

    It writes the file `marker` then, and hangs in a thread that the interpreter's end waits for.
    """

    def __init__(self, *, rank, call, marker):
        self.is_ours = int(os.environ.get("LOCAL_RANK", 0)) == rank
        self.call, self.marker, self.num_calls = call, marker, 0
        self.reward = ShapesReward(score="soft")

    def __call__(self, images, prompts):
        self.num_calls += 1
        if self.is_ours and self.num_calls == self.call:
            Path(self.marker).touch()
            with ThreadPoolExecutor() as pool:
                pool.submit(time.sleep, 240).result()
        return self.reward(images, prompts)
