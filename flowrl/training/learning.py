"""The question whether a run learns anything at all, which is not whether it learns well."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flowrl.advantages import Advantages
from flowrl.losses.protocol import Loss
from flowrl.parallel.collectives import gather
from flowrl.values.plural import counted

CONDITIONS = {
    "rewards": (
        "no image has a reward: each was missing, or its prompt is none that the reward judges; "
        "the reasons are in train.log"
    ),
    "advantages": (
        "the rewards of each group were equal, so every advantage was 0; choose a reward that "
        "tells the images of one prompt apart, other prompts, or a larger batch.group_size"
    ),
    "gradients": (
        "the gradient was 0 in every update that had advantages; look at the loss and at "
        "lora.targets"
    ),
    "changes": "no optimizer step changed a weight; raise optimizer.lr, or look at learning_rate",
}
"""Events that must happen at least once in a run, in order, and the words where one did not."""


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int32}
"""The integers that stand for numbers of so many bytes, two of them for one of eight."""


class NothingLearned(RuntimeError):
    """All iterations of a run are done, and it cannot have learned from any of them."""


class Learning:
    """A record of the `CONDITIONS` that a run has met so far.

    A run has learned if in one of its iterations a sample had an advantage other than 0 and a step
    of the optimizer with a gradient other than 0 changed a weight. So weight decay and a reference
    penalty alone teach nothing, and a run that learns as slowly as its numbers allow has learned.
    Where a loss needs no advantages, a sample with a reward is enough; where it needs no rewards,
    neither is a condition.
    """

    def __init__(self, *, needs_rewards: bool = True, needs_advantages: bool = True) -> None:
        self.needs_rewards = needs_rewards
        self.needs_advantages = needs_advantages
        self.met: set[str] = set()
        self.has_lesson = False

    @classmethod
    def of(cls, loss: Loss) -> Learning:
        """Begin the record of a run with this loss."""
        return cls(needs_rewards=loss.needs_rewards, needs_advantages=loss.needs_advantages)

    def take(self, has_reward: bool, advantages: Advantages) -> None:
        """Take in the rewards and advantages of an iteration, which its updates then use."""
        has_what_it_needs = has_reward or not self.needs_rewards
        is_compared = bool(advantages.values.any()) or not self.needs_advantages
        self.has_lesson = has_what_it_needs and is_compared
        if has_what_it_needs:
            self.met.add("rewards")
        if self.has_lesson:
            self.met.add("advantages")

    @contextmanager
    def watch(self, parameters: Sequence[Tensor], gradient_norm: Tensor) -> Iterator[None]:
        """Compare the weights before and after an optimizer step, until one has changed them."""
        is_due = self.has_lesson and "changes" not in self.met and bool(gradient_norm > 0)
        before = _fingerprint(parameters) if is_due else None
        yield
        if before is not None:
            self.met.add("gradients")
            if not torch.equal(before, _fingerprint(parameters)):
                self.met.add("changes")

    def state(self) -> list[str]:
        """Return what a checkpoint keeps."""
        return sorted(self.met)

    def load_state(self, met: Sequence[str] | None) -> None:
        """Take back what `state` gave; None, from a checkpoint of an earlier version, counts as
        having learned.
        """
        self.met = set(CONDITIONS if met is None else met)

    def check(self, num_iterations: int) -> None:
        """Raise NothingLearned unless any process has met all conditions; to be called by all of
        them.
        """
        met = set[str]().union(*gather(self.met))
        for name, reason in CONDITIONS.items():
            if name not in met:
                raise NothingLearned(
                    f"nothing was learned in {counted(num_iterations, 'iteration')}: {reason}; "
                    "nothing exported"
                )


@torch.no_grad()
def _fingerprint(parameters: Sequence[Tensor]) -> Tensor:
    """Compute a sum a tensor, which changes when its numbers do.

    A copy would be too large where all weights are trained. Integers are summed, which loses
    nothing, since not every device has the float64 that a sum of the numbers would need.
    """
    # Of sharded weights each process looks at its own shard; `check` asks all of them.
    local = [value.to_local() if isinstance(value, DTensor) else value for value in parameters]
    return torch.stack([_mixed(value).sum() for value in local])


def _mixed(values: Tensor) -> Tensor:
    """Return integers of each number, unlike those of any other number of its dtype.

    Multiplication and exclusive or spread each bit over all, as in hash functions, so that rises
    and falls of the numbers do not cancel in a sum. Overflow wraps around, which loses nothing.
    """
    bits = values.detach().flatten().view(_BITS[values.element_size()])
    if bits.dtype == torch.int16:
        bits = bits.int()
    # Without the signs, which shifts repeat.
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * 0x2C1B3C6D
    return bits ^ ((bits >> 12) & 0xFFFFF)
