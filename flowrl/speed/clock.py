"""A clock that waits for the GPU, and the measured speed of a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIDE_ON_GPU = 8192
"""Rows and columns of the matrices that are multiplied on a GPU."""
SIDE_ON_CPU = 1024
"""Rows and columns of those that are multiplied on a CPU."""


def wait_for_gpu() -> None:
    """Wait until the GPU, where there is one, has nothing left to do."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(part: Callable[[], object]) -> float:
    """Time a call, and what it left for the GPU to do."""
    wait_for_gpu()
    start = time.perf_counter()
    part()
    wait_for_gpu()
    return time.perf_counter() - start


def matmul_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Measure floating-point operations a second, of the best of ten large matrix products.

    Products of float32 are rounded as `torch.get_float32_matmul_precision()` says at that moment.
    """
    n = SIDE_ON_CPU if device.type == "cpu" else SIDE_ON_GPU
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(10))
