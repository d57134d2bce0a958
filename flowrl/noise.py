"""Counter-based noise: a function of (seed, iteration, prompt, sample, step) and nothing else.

Rank, batch size and world size cannot change it, so one run gives the same rollouts on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    `rollout.shared_initial_noise` a run asks for sample 0's initial noise for the whole group.
    """
    rows = np.empty((len(samples), *shape), dtype=np.float32)
    # One generator, sent to the start of each row's stream: it takes four tenths of the time that a
    # new one for every row does.
    bits = np.random.Philox(key=[seed, iteration])
    generator = np.random.Generator(bits)
    start = bits.state
    for row, (prompt, sample) in zip(rows, samples, strict=True):
        # The first word of the counter is what Philox itself counts up; 1 is added to the step,
        # since INITIAL is -1 and words are unsigned.
        start["state"]["counter"][:] = (0, step + 1, sample, prompt)
        bits.state = start
        generator.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return values that the CPU has made on a device; the host goes on before they are there.

    A copy to a GPU out of ordinary memory waits for all that the GPU has been given so far, one out
    of pinned memory does not.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
