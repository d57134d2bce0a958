"""The callbacks of `scripts/benchmark.py`: peak memory, iterations beside their bare parts, and a
profile of one iteration.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.profiler import ProfilerActivity, record_function

from flowrl.callbacks.record import peak_memory_gib, reset_peak_memory
from flowrl.parallel.collectives import gather
from flowrl.speed.bare_parts import BareParts, Seconds, slowest
from flowrl.speed.clock import matmul_speed, seconds, wait_for_gpu
from flowrl.speed.operations import operations_of
from flowrl.values.units import GIB

ALONE = 2
"""The number of first iterations, which nothing disturbs: one that warms up, and one that has an
optimizer's state from its start.
"""
STRETCH = "iteration"
"""The annotation of the iteration that is profiled."""


class Peak(Callback):
    """The callback that measures the peak memory from the moment training starts to the end of the
    iterations that nothing disturbs, in GiB; `reserved` is None on a CPU.
    """

    allocated: float
    reserved: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.device.type == "cuda":
            # What text encoders left behind would count as reserved.
            torch.cuda.empty_cache()
        reset_peak_memory()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != ALONE - 1:
            return
        self.allocated = max(gather(peak_memory_gib()))
        if pl_module.device.type == "cuda":
            self.reserved = max(gather(torch.cuda.max_memory_reserved() / GIB))


class Alternate(Callback):
    """The callback that times iterations, and before each but those that nothing disturbs its bare
    parts.
    """

    def __init__(self) -> None:
        self.bare: list[Seconds] = []
        self.whole: list[float] = []
        self.laps: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch
        if batch_idx == ALONE:
            for part in BareParts(pl_module, batch, is_short=True).parts().values():
                part()
        if batch_idx >= ALONE:
            parts = BareParts(pl_module, batch)
            self.bare.append({name: seconds(part) for name, part in parts.parts().items()})
        wait_for_gpu()
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wait_for_gpu()
        self.whole.append(time.perf_counter() - self.start)
        self.laps.append(dict(pl_module.last_metrics))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Now, since Lightning moves the network to the CPU when training ends.
        self.operations = operations_of(BareParts(pl_module, self.batch))
        self.dtype: torch.dtype = pl_module.transformer.dtype
        self.device: torch.device = pl_module.device
        self.best = matmul_speed(self.dtype, self.device)
        self.bare = slowest(gather(self.bare))
        self.whole = [max(times) for times in zip(*gather(self.whole), strict=True)]


class Profile(Callback):
    """The callback that runs PyTorch's profiler over the first process's iteration after those that
    nothing disturbs; `plain_seconds` is what the one before took without it.
    """

    plain_seconds: float
    profiler: torch.profiler.profile
    has_device: bool

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        wait_for_gpu()
        if batch_idx == ALONE and trainer.is_global_zero:
            self.has_device = pl_module.device.type == "cuda"
            on_device = [ProfilerActivity.CUDA] if self.has_device else []
            self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *on_device])
            self.profiler.start()
            self.stretch = record_function(STRETCH)
            self.stretch.__enter__()
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wait_for_gpu()
        if batch_idx == ALONE - 1:
            self.plain_seconds = time.perf_counter() - self.start
        if batch_idx == ALONE and trainer.is_global_zero:
            self.stretch.__exit__(None, None, None)
            self.profiler.stop()
