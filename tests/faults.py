"""What goes wrong in a job, on order: callbacks for `train.py`, which finds them by PYTHONPATH."""

import os
import signal

import torch
from lightning import Callback


class Fault(Callback):
    """After its second iteration the last rank of the job with seed `crash` raises, and that of `kill` is killed.

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


class Poison(Callback):
    """Makes a trained weight, or an averaged one, NaN after iteration number `after`. Not in a resumed run."""

    def __init__(self, *, after, kind):
        self.after, self.kind = after, kind

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.num_iterations == self.after and trainer.datamodule.start_iteration == 0:
            with torch.no_grad():
                list(pl_module.weights()[self.kind].values())[5].view(-1)[1] = torch.nan
