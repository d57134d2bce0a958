"""Requests put together into batches for one scorer, which is never called twice at a time."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flowrl import background
from flowrl.rewards.outputs import concatenate, reorder
from flowrl.serving.counters import Counters
from flowrl.types import Prompt, RewardOutput

Score = Callable[[Tensor, Sequence[Prompt]], RewardOutput]
"""Scores images, and never raises: failures are missing samples, as `RewardModule.score` has it."""


class Busy(Exception):
    """More images wait than the server holds."""


@dataclass(slots=True)
class Job:
    """One request, and where its scores will be."""

    images: Tensor
    prompts: list[Prompt]
    output: asyncio.Future[RewardOutput]


class Batcher:
    """Collects requests for up to `max_wait` seconds or `max_batch` images, and scores them together by image size.

    A request that fails as a whole in a shared batch is scored once more alone, so that another one's bad image cannot
    take it along. A request that is cancelled before its turn is not scored.
    """

    def __init__(self, score: Score, *, max_batch: int, max_wait: float, max_waiting: int, counters: Counters) -> None:
        self.scorer, self.max_batch, self.max_wait, self.max_waiting = score, max_batch, max_wait, max_waiting
        self.counters = counters
        self.jobs: asyncio.Queue[Job] = asyncio.Queue()

    @contextmanager
    def place(self, count: int) -> Iterator[None]:
        """Room for `count` images, to be taken before they are decoded. Raises Busy beyond `max_waiting` images."""
        if self.counters.waiting + count > self.max_waiting:
            raise Busy(f"{self.counters.waiting} images are waiting already; try again later")
        self.counters.waiting += count
        try:
            yield
        finally:
            self.counters.waiting -= count

    async def score(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        """The scores of one request that has its `place`, once its turn has come."""
        job = Job(images, prompts, asyncio.get_running_loop().create_future())
        try:
            self.jobs.put_nowait(job)
            return await job.output
        finally:
            job.images = torch.empty(0)  # a cancelled job stays in the queue, its pixels need not

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            jobs = await self._collect()
            by_size: dict[torch.Size, list[Job]] = defaultdict(list)
            for job in jobs:
                if not job.output.done():  # its client has left
                    by_size[job.images.shape[1:]].append(job)
            for group in by_size.values():
                try:
                    await self._answer([job for job in group if not job.output.done()])
                except Exception as error:  # a fault of ours must not end the loop
                    for job in group:
                        if not job.output.done():
                            job.output.set_exception(error)

    async def _collect(self) -> list[Job]:
        jobs = [await self.jobs.get()]
        deadline = time.monotonic() + self.max_wait
        while sum(len(job.prompts) for job in jobs if not job.output.done()) < self.max_batch:
            rest = deadline - time.monotonic()
            if self.jobs.empty() and rest <= 0:
                break
            try:
                jobs.append(self.jobs.get_nowait() if rest <= 0 else await asyncio.wait_for(self.jobs.get(), rest))
            except TimeoutError:
                break
        return jobs

    async def _answer(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        images = torch.cat([job.images for job in jobs])
        whole = await self._in_background(images, [prompt for job in jobs for prompt in job.prompts])
        start = 0
        for job in jobs:
            own = reorder(whole, torch.arange(start, start + len(job.prompts)))
            start += len(job.prompts)
            if len(jobs) > 1 and not own.is_valid.any() and not job.output.done():
                own = await self._in_background(job.images, job.prompts)
            self.counters.images += len(job.prompts)
            self.counters.missing += int((~own.is_valid).sum())
            if not job.output.done():
                job.output.set_result(own)

    async def _in_background(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        """Scored in slices of `max_batch`, beside the event loop."""
        outputs = []
        for start in range(0, len(prompts), self.max_batch):
            part = slice(start, start + self.max_batch)
            begin = time.perf_counter()
            work = partial(self.scorer, images[part], prompts[part])
            outputs.append(await asyncio.wrap_future(background.start(work, "scorer")))
            self.counters.batches += 1
            self.counters.scoring_seconds += time.perf_counter() - begin
        return concatenate(outputs)
