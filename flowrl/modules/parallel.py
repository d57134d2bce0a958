"""How a run is spread over processes."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only


def replicas(*, timeout_minutes: float, bucket_megabytes: int) -> DDPStrategy:
    """The same weights in every process, gradients averaged: what suits LoRA, whose gradients are small."""
    return DDPStrategy(
        timeout=timedelta(minutes=timeout_minutes),
        bucket_cap_mb=bucket_megabytes,
        find_unused_parameters=False,
    )


def is_later_rank() -> bool:
    """Whether this process joins a run that another one began; known before the processes have met."""
    return bool(getattr(rank_zero_only, "rank", 0))
