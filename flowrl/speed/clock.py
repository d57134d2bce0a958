"""A clock that waits for the GPU, and the measured speed of a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SIDE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices that are multiplied, by the type of device."""


def wait_for_gpu() -> None:
    """Wait until the GPU, where there is one, has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    n = SIDE[device.type]
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(10))
