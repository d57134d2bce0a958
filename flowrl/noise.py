"""Counter-based noise: a function of (seed, iteration, prompt, sample, step) and nothing else.

Rank, batch size and world size cannot change it, so one run gives the same rollouts on any machine.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

INITIAL = -1
"""The `step` of the initial latents."""
FORWARD = 1 << 16
"""The `step` of the first noise that a forward-process loss adds, far above any sampling step."""
CHOICE = 1 << 48
"""The `step` of the first draw that picks a sample's trained sigmas, far above any noise."""
DATA = 1 << 56
"""The `step` of the first noise that real images are given, far above any choice."""

_of_thread = threading.local()


def gaussian_noise(
    shape: Sequence[int],
    *,
    seed: int,
    iteration: int,
    samples: Sequence[tuple[int, int]],
    step: int,
) -> Float[Tensor, "B ..."]:
    """Draw standard normal float32 noise on the CPU, one row of `shape` for each (prompt index,
    sample index).

    Each row is its own Philox stream with key (seed, iteration) and counter (0, step + 1, sample,
    prompt): equal indices give equal rows in whatever batch they are drawn. With
    `rollout.shared_initial_noise` a run asks for sample 0's initial noise for the whole group,
    which is drawn once.
    """
    distinct = {indices: row for row, indices in enumerate(dict.fromkeys(samples))}
    rows = np.empty((len(distinct), *shape), dtype=np.float32)
    # One generator, sent to the start of each row's stream: a new one for every row, or even for
    # every call, would take longer than the numbers do.
    bits, start = _generator_of_thread()
    generator = np.random.Generator(bits)
    start["state"]["key"][:] = (seed, iteration)
    for row, (prompt, sample) in zip(rows, distinct, strict=True):
        # The first word of the counter is what Philox itself counts up; 1 is added to the step,
        # since INITIAL is -1 and words are unsigned.
        start["state"]["counter"][:] = (0, step + 1, sample, prompt)
        bits.state = start
        generator.standard_normal(dtype=np.float32, out=row)
    noise = torch.from_numpy(rows)
    if len(distinct) == len(samples):
        return noise
    return noise[[distinct[indices] for indices in samples]]


def _generator_of_thread() -> tuple[np.random.Philox, Any]:
    """Return a generator that no other thread uses, and the state of one that has drawn nothing."""
    if not hasattr(_of_thread, "bits"):
        _of_thread.bits = np.random.Philox(0)
        _of_thread.unused = _of_thread.bits.state
    return _of_thread.bits, _of_thread.unused


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return values that the CPU has made on a device; the host goes on before they are there.

    A copy to a GPU out of ordinary memory waits for all that the GPU has been given so far, one out
    of pinned memory does not.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
