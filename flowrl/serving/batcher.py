"""Requests are put together into batches for one scorer, never called twice at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import UInt8
from torch import Tensor

from flowrl.parallel import background
from flowrl.rewards import wire
from flowrl.rewards.outputs import concatenate, reorder
from flowrl.serving.counters import Counters
from flowrl.serving.uploads import Busy
from flowrl.types import Prompt, RewardOutput

log = logging.getLogger(__name__)

Score = Callable[[Tensor, Sequence[Prompt]], RewardOutput]
"""A function that scores images and never raises: failures are missing samples, as
`RewardModule.score` has it.
"""


@dataclass(slots=True)
class Job:
    """One request, whose images stay bytes until they are scored, and the future of its scores.

    As bytes they take a quarter of what they take as float32.
    """

    pixels: UInt8[Tensor, "B 3 H W"]
    prompts: list[Prompt]
    output: asyncio.Future[RewardOutput]

    @property
    def is_awaited(self) -> bool:
        """Tell whether somebody still waits for scores: a client may leave before its turn."""
        return not self.output.done()


class Batcher:
    """A queue that collects requests for up to `max_wait` seconds or `max_batch` images, and scores
    them together by image size.

    - A call of the scorer has up to `max_batch` images, and as many as take `max_batch_bytes` as
      bytes; it gets them as float32, four times as large.
    - Up to `max_waiting` images, and requests of `max_waiting_bytes`, may wait.
    - A request that fails as a whole in a shared batch is scored once more alone, so that another
      one's bad image cannot take it along.
    - A request that is cancelled before its turn is not scored.
    """

    def __init__(
        self,
        score: Score,
        *,
        max_batch: int,
        max_batch_bytes: int,
        max_wait: float,
        max_waiting: int,
        max_waiting_bytes: int,
        counters: Counters,
    ) -> None:
        self.scorer = score
        self.counters = counters
        self.max_batch = max_batch
        self.max_batch_bytes = max_batch_bytes
        self.max_wait = max_wait
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self.jobs: asyncio.Queue[Job] = asyncio.Queue()

    @contextmanager
    def place(self, count: int, num_bytes: int) -> Iterator[None]:
        """Hold room for `count` images of `num_bytes`, to be taken before they are decoded. Raises
        Busy if there is none.
        """
        if self.counters.waiting + count > self.max_waiting:
            raise Busy(f"{self.counters.waiting} images are waiting already; try again later")
        if self.counters.waiting_bytes + num_bytes > self.max_waiting_bytes:
            raise Busy(
                f"{self.counters.waiting_bytes} bytes of images are waiting already; try again "
                "later"
            )
        self.counters.waiting += count
        self.counters.waiting_bytes += num_bytes
        try:
            yield
        finally:
            self.counters.waiting -= count
            self.counters.waiting_bytes -= num_bytes

    async def score(self, pixels: UInt8[Tensor, "B 3 H W"], prompts: list[Prompt]) -> RewardOutput:
        """Return the scores of one request that has its `place`, once its turn has come."""
        output = asyncio.get_running_loop().create_future()
        job = Job(pixels, prompts, output)
        try:
            self.jobs.put_nowait(job)  # the queue has no bound: places have
            return await job.output
        finally:  # a cancelled job stays in the queue, what it holds need not
            job.pixels = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
            job.prompts = []

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            jobs = await self._collect()
            by_size: dict[torch.Size, list[Job]] = defaultdict(list)
            for job in _awaited(jobs):
                size = job.pixels.shape[1:]  # [3, H, W]
                by_size[size].append(job)
            for jobs_of_size in by_size.values():
                try:
                    # Asked anew: clients may have left while other sizes were scored.
                    await self._answer(_awaited(jobs_of_size))
                except Exception as error:  # a fault of ours must not end the loop
                    # Here, since perhaps nobody waits any more to whom it could be raised.
                    log.exception("scoring a batch failed")
                    for job in _awaited(jobs_of_size):
                        job.output.set_exception(error)

    async def _collect(self) -> list[Job]:
        """Wait for a request, and then for others to share its call."""
        jobs = [await self.jobs.get()]
        deadline = time.monotonic() + self.max_wait
        # A job whose client has left fills no batch.
        while sum(len(job.prompts) for job in _awaited(jobs)) < self.max_batch:
            seconds = deadline - time.monotonic()
            try:
                if seconds > 0:
                    jobs.append(await asyncio.wait_for(self.jobs.get(), seconds))
                else:  # late, but what is there already costs no waiting
                    jobs.append(self.jobs.get_nowait())
            except (TimeoutError, asyncio.QueueEmpty):
                break
        return jobs

    async def _answer(self, jobs: list[Job]) -> None:
        """Score the jobs of one image size together, and a job that fails as a whole once more
        alone.
        """
        if not jobs:
            return
        # A job that is cancelled meanwhile loses its own images and prompts.
        contents = [(job.pixels, job.prompts) for job in jobs]
        whole = await self._in_background(contents)
        start = 0
        for job, content in zip(jobs, contents, strict=True):
            _, prompts = content
            count = len(prompts)
            output = reorder(whole, torch.arange(start, start + count))
            start += count
            is_shared = len(jobs) > 1
            if is_shared and job.is_awaited and not output.is_valid.any():
                output = await self._in_background([content])
            self.counters.images.inc(count)
            self.counters.missing.inc(int((~output.is_valid).sum()))
            if job.is_awaited:
                job.output.set_result(output)

    async def _in_background(self, contents: Sequence[tuple[Tensor, list[Prompt]]]) -> RewardOutput:
        """Score images and prompts in slices that a call of the scorer may have, beside the event
        loop.
        """
        prompts: list[Prompt] = []
        for _, job_prompts in contents:
            prompts += job_prompts
        tensors = [pixels for pixels, _ in contents]
        image_bytes = tensors[0][0].nbytes  # all have one size
        most_by_bytes = max(self.max_batch_bytes // image_bytes, 1)
        size = min(self.max_batch, most_by_bytes)
        outputs = []
        for start in range(0, len(prompts), size):
            end = start + size
            # Copied slice by slice, so that no more than a slice is held twice.
            pixels = _rows(tensors, start, end)
            begin = time.perf_counter()
            work = partial(self._score_pixels, pixels, prompts[start:end])
            future = background.start(work, "scorer")
            outputs.append(await asyncio.wrap_future(future))
            self.counters.batches.inc()
            self.counters.batch_images.observe(len(pixels))
            self.counters.scoring_seconds.observe(time.perf_counter() - begin)
        return concatenate(outputs)

    def _score_pixels(self, pixels: Tensor, prompts: list[Prompt]) -> RewardOutput:
        return self.scorer(wire.to_unit(pixels), prompts)


def _awaited(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.is_awaited]


def _rows(tensors: Sequence[Tensor], start: int, end: int) -> Tensor:
    """Return rows `start` to `end` of the tensors, as if they were one."""
    pieces = []
    # Both are counted from the first row of each tensor in turn, so they fall below 0 behind it.
    for tensor in tensors:
        pieces.append(tensor[max(start, 0) : max(end, 0)])
        start -= len(tensor)
        end -= len(tensor)
    return torch.cat(pieces)
