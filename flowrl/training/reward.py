"""The reward module: holds the frozen scorer, moves it, and turns failures into missing rewards."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from lightning import LightningModule
from torch import Tensor, nn

from flowrl.errors import UserError
from flowrl.parallel import background
from flowrl.rewards.attempt import attempt
from flowrl.rewards.clips import Clips, Frames
from flowrl.rewards.differentiable import score_with_graph
from flowrl.rewards.outputs import (
    LARGEST,
    REASON,
    concatenate,
    fill,
    first_reason,
    is_usable,
    missing,
    reorder,
)
from flowrl.rewards.protocol import Images, Reward, asks_for_whole_groups, only_computes
from flowrl.training.memory import SMALLER_SCORER, memory_for
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Duration, Share
from flowrl.values.check import checked

log = logging.getLogger(__name__)

Result = TypeVar("Result")

Viewer = Callable[[Float[Tensor, "B *F 3 H W"], Sequence[Prompt]], None]
"""Is given the images that are trained on, with their prompts."""

MOST_WAITING = 2
"""Calls of a scorer that may wait or run before another one: enough to keep it busy, and few
enough that images do not pile up on the device where it is slower than the rollout.
"""

PATIENCE = 5
"""A run stops after so many iterations in a row without a prompt that the reward judges; one may
come by chance.
"""


NOT_FINITE = "image is not finite"
"""The reason that an image which holds NaN or infinity has no score."""


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Samples whose group is not whole yet, and the future that waits for their scores."""

    images: Float[Tensor, "B *F 3 H W"]
    prompts: Sequence[Prompt]
    scores: Future[RewardOutput]


class TooManyMissingRewards(RuntimeError):
    """More rewards failed than `max_missing` allows."""


class RewardModule(LightningModule):
    """The module scores images without gradients, and counts samples without a score as missing.

    Missing are those that the scorer raises for, or gives no number. Images that are not finite are
    missing without being shown to the scorer.

    `submit` scores in the background while the next images are drawn; few calls wait, and calls
    never overlap each other, so that a scorer need not be thread-safe. On a CPU, which draws no
    faster for it, a scorer that only computes is called in the caller's thread instead. A scorer
    that asks for whole groups is given one at a time. `check` raises TooManyMissingRewards where
    more than `max_missing` (a share) of the samples that a reward judges failed.

    A call that takes more than `scorer_timeout` seconds (None: no limit) is given up: its samples
    are missing, and so are those of later calls, at once, for as long as it goes on. No thread can
    be killed, so it is left behind and ends with the process, whose end it cannot hold up. Calls in
    the caller's thread have no limit.

    Clips are scored as `frames` says, which a module that scores images can do without.
    """

    @checked("")
    def __init__(
        self,
        *,
        reward: Reward,
        max_missing: Share,
        scorer_timeout: Duration | None = None,
        frames: Frames | None = None,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.max_missing = max_missing
        self.scorer_timeout = scorer_timeout
        self.frames = frames
        self.num_idle = 0
        self.viewer: Viewer | None = None
        self.newest: Future[Any] | None = None
        self.waiting: deque[Future[Any]] = deque()
        self.held_back: list[HeldBack] = []
        self.running: Future[RewardOutput] | None = None
        self.began = 0.0
        if isinstance(reward, nn.Module):
            reward.requires_grad_(False).eval()

    def submit(
        self,
        images: Float[Tensor, "B *F 3 H W"],
        prompts: Sequence[Prompt],
        *,
        first: int = 0,
        group_size: int = 1,
        are_trained_on: bool = False,
    ) -> Future[RewardOutput]:
        """Score after everything submitted before, where possible while the caller goes on;
        `collect` waits for it. Images that are trained on, which those of completions, candidates
        and evaluations are not, are shown to the `viewer`, where there is one, in the caller's
        thread.

        Samples are numbered group by group, these from `first` on. Where the scorer asks for whole
        groups, they are held back until the group of the last of them is whole.
        """
        if are_trained_on and self.viewer is not None:
            self.viewer(images, prompts)
        if not asks_for_whole_groups(self.reward):
            return self._in_background(lambda: self.score(images, prompts))
        if first % group_size == 0:
            # Whatever is still there is of a round that was broken off: nobody may wait for it.
            for samples in self.held_back:
                samples.scores.set_exception(RuntimeError("the rest of its group never came"))
            self.held_back = []
        scores: Future[RewardOutput] = Future()
        self.held_back.append(HeldBack(images, prompts, scores))
        if (first + len(prompts)) % group_size == 0:
            whole = self.held_back
            self.held_back = []
            self._in_background(lambda: self._answer(whole, group_size))
        return scores

    def score_with_graph(
        self, images: Float[Tensor, "B *F 3 H W"], prompts: Sequence[Prompt]
    ) -> Float[Tensor, "B"]:
        """Return the values of images, or of clips as `frames` says, with a graph that leads back
        to them; on the reward's device, and checked by nobody.

        Raises UserError where the reward has no gradient.
        """
        return score_with_graph(self.reward, images, prompts, self.frames)

    def _in_background(self, work: Callable[[], Result]) -> Future[Result]:
        """Do `work` after all work that began before: in a thread, where that gains anything."""
        earlier = self.newest

        def work_in_turn() -> Result:
            if earlier is not None:
                wait([earlier])
            return work()

        if self._takes_turns():
            future: Future[Result] = Future()
            background.run(work_in_turn, future)
        else:
            while len(self.waiting) >= MOST_WAITING:
                wait([self.waiting.popleft()])
            future = background.start(work_in_turn, "reward")
            self.waiting.append(future)
        self.newest = future
        return future

    def _takes_turns(self) -> bool:
        """Tell whether scorer and rollout compute on the same cores, and so had better do it one
        after the other, in one thread.
        """
        return self.device.type == "cpu" and only_computes(self.reward)

    def _answer(self, held: Sequence[HeldBack], group_size: int) -> None:
        """Score whole groups, and give each submission the scores of its samples."""
        images = torch.cat([samples.images for samples in held])
        prompts = [prompt for samples in held for prompt in samples.prompts]
        try:
            output = self.score(images, prompts, group_size)
        except BaseException as error:  # raised where the scores are asked for
            for samples in held:
                samples.scores.set_exception(error)
            return
        start = 0
        for samples in held:
            stop = start + len(samples.prompts)
            samples.scores.set_result(reorder(output, torch.arange(start, stop)))
            start = stop

    def collect(self, scores: Sequence[Future[RewardOutput]]) -> RewardOutput:
        """Wait for what was submitted, and return it in the given order.

        Raises UserError where samples are still held back, whose scores would never come, and
        OutOfMemory where a scorer runs out of it.
        """
        if self.held_back:
            raise UserError(
                f"reward: {type(self.reward).__name__} asks for whole groups, but the last one is "
                "not whole"
            )
        with memory_for("scorer", SMALLER_SCORER):
            return concatenate([score.result() for score in scores])

    def waits_for(self) -> str | None:
        """Say which scorer is being asked, and since when; return None where none is."""
        if self.running is None or self.running.done():
            return None
        return f"{type(self.reward).__name__}, asked {time.monotonic() - self.began:.0f} s ago"

    def score(
        self,
        images: Images | Float[Tensor, "B F 3 H W"],
        prompts: Sequence[Prompt],
        group_size: int = 1,
    ) -> RewardOutput:
        """Return checked scores on the CPU, with `terms` and `applies`.

        Values and terms are NaN where no reward applies. `group_size` consecutive samples are a
        group, for a scorer that asks for whole ones; no other scorer is told. Raises UserError for
        clips where nothing says how they are to be seen.
        """
        if isinstance(images, Tensor) and images.ndim == 5:
            if self.frames is None:
                raise UserError("frames: say how clips are scored, as by count: 4 and reduce: mean")
            return self._score_whole(Clips(images, self.frames), prompts, group_size)
        return self._score_whole(images, prompts, group_size)

    def _score_whole(
        self, images: Images | Clips, prompts: Sequence[Prompt], group_size: int
    ) -> RewardOutput:
        """Score images, or clips with how they are seen, by whole groups where these are asked
        for.
        """
        if not asks_for_whole_groups(self.reward):
            return _complete(self._ask_finite(images, prompts))
        outputs = []
        for start in range(0, max(len(prompts), 1), group_size):
            group = slice(start, start + group_size)
            outputs.append(_complete(self._ask_finite(images[group], prompts[group])))
        return concatenate(outputs)

    def _ask_finite(self, images: Images | Clips, prompts: Sequence[Prompt]) -> RewardOutput:
        """Return the scorer's answer for the images that are finite, clips in all of their frames;
        the others are missing.
        """
        if not isinstance(images, Tensor | Clips):
            return self._ask(images, prompts)
        pixels = images.values if isinstance(images, Clips) else images
        # A sum is finite only if all of its numbers are, and is asked for in far less time.
        if pixels.sum(dtype=torch.float32).isfinite() or pixels.isfinite().all():
            return self._ask(images, prompts)
        is_finite = pixels.isfinite().flatten(1).all(1).tolist()
        rows = [row for row, ok in enumerate(is_finite) if ok]
        log.warning(
            "%d of %d images are not finite: they are not scored",
            len(prompts) - len(rows),
            len(prompts),
        )
        if not rows:
            return self._missing(len(prompts), NOT_FINITE)
        reasons = {row: NOT_FINITE for row, ok in enumerate(is_finite) if not ok}
        return fill(self._ask(images[rows], [prompts[row] for row in rows]), reasons)

    def _ask(self, images: Images | Clips, prompts: Sequence[Prompt]) -> RewardOutput:
        """Return the scorer's answer, or missing samples where it, or an earlier call, takes too
        long.
        """
        if self.running is not None and not self.running.done():
            return self._missing(len(prompts), f"{self.waits_for()}, is busy with an earlier call")

        @torch.no_grad()
        def work() -> RewardOutput:
            pixels = images.values if isinstance(images, Clips) else images
            if isinstance(pixels, Tensor) and pixels.is_cuda:
                # The current device belongs to a thread, as does the stream: the default one, in
                # the order of calls.
                torch.cuda.set_device(pixels.device)
            return attempt(self.reward, images, prompts)

        self.began = time.monotonic()
        if self._takes_turns():
            self.running = Future()
            background.run(work, self.running)
            return self.running.result()
        self.running = background.start(work, "scorer")
        wait([self.running], self.scorer_timeout)
        if self.running.done():
            return self.running.result()
        background.give_up(self.running)
        reason = (
            f"{type(self.reward).__name__} gave no scores within "
            f"scorer_timeout={self.scorer_timeout:g} s"
        )
        log.error("%s; it is left behind", reason)
        return self._missing(len(prompts), reason)

    def _missing(self, count: int, reason: str) -> RewardOutput:
        return missing(count, reason, getattr(self.reward, "weights", None))

    def check_applies(self, terms: Float[Tensor, "B R"]) -> None:
        """Note whether any reward applied in an iteration, of which these are all terms.

        Raises UserError where none applied to any prompt of `PATIENCE` iterations in a row, and so
        must be called once in each.
        """
        self.num_idle = self.num_idle + 1 if terms.isnan().all() else 0
        if self.num_idle == PATIENCE:
            raise UserError(
                f"reward applied to no prompt of {PATIENCE} iterations in a row, so nothing can be "
                "learned; choose "
                "data whose prompts it can judge (reward=ocr needs text in quotes), or another "
                "reward"
            )

    def check(
        self,
        is_valid: Bool[Tensor, "B"],
        terms: Float[Tensor, "B R"],
        info: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Raise TooManyMissingRewards where too many are missing, with the first reason in `info`.

        The share is that of the samples with a term that is not NaN: where no reward applies, none
        can fail.
        """
        is_judged = ~terms.isnan().all(1)
        num_missing = int((~is_valid & is_judged).sum())
        num_judged = int(is_judged.sum())
        # A quotient of counts rounds to the very float that the same share in YAML does, so that it
        # is not above it.
        share = num_missing / max(num_judged, 1)
        if share > self.max_missing:
            reason = first_reason(info)
            cause = f"the first: {reason}" if reason else "see the errors above"
            raise TooManyMissingRewards(
                f"{share:.0%} of the rewards are missing ({num_missing} of {num_judged}), more "
                "than "
                f"max_missing={self.max_missing:.0%}; {cause}"
            )


def _with_reasons(info: Sequence[Mapping[str, Any]], is_valid: Tensor) -> list[Mapping[str, Any]]:
    """Return one entry a sample, where a missing one has a reason."""
    entries = list(info) if len(info) == len(is_valid) else [{} for _ in is_valid]
    unknown = {REASON: f"the reward gave no number, or one beyond {LARGEST:.0e}"}
    return [
        entry if ok else unknown | dict(entry)
        for entry, ok in zip(entries, is_valid.tolist(), strict=True)
    ]


def _complete(output: RewardOutput) -> RewardOutput:
    """Add `terms`, `applies` and reasons to an output, and make missing what is no number."""
    values = output.values.float().cpu()
    parts = {name: part.float().cpu() for name, part in output.parts.items()}
    parts = {name: part.where(is_usable(part), torch.nan) for name, part in parts.items()}
    terms = (values[:, None] if output.terms is None else output.terms).float().cpu()
    applies = (
        torch.ones_like(terms, dtype=torch.bool) if output.applies is None else output.applies.cpu()
    )
    is_valid = output.is_valid.cpu() & (is_usable(terms) | ~applies).all(1)
    is_valid &= is_usable(values) | ~applies.any(1)
    values = torch.where(is_valid, values, 0.0)
    terms = torch.where(is_valid[:, None], terms, 0.0)
    values = values.masked_fill(~applies.any(1), torch.nan)
    terms = terms.masked_fill(~applies, torch.nan)
    info = _with_reasons(output.info, is_valid)
    return RewardOutput(values, is_valid, parts, info, terms, output.weights, applies)
