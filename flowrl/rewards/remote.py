"""A scorer is asked behind HTTP, such as `scripts/serve_reward.py` starts one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flowrl.rewards import wire
from flowrl.rewards.client import Client, Unanswered, Unavailable, Unfit, check_url, is_object
from flowrl.rewards.images import batches
from flowrl.rewards.outputs import concatenate, first_reason, missing
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Text
from flowrl.values.check import checked

log = logging.getLogger(__name__)

ABSENT = (404, 405, 501)
"""Statuses of a page that a server does not have; /health may be left out by one that is not
FlowRL's.
"""


class Remote:
    """A scorer that sends images to `url`/score in requests of `batch_size`; see
    `flowrl.rewards.wire` for what is said.

    The samples of a request that gets no answer, or one of the wrong length or form, are missing,
    and so is a sample whose value is no number. A mixture behind the server comes back as one
    value: to treat its rewards apart (`gdpo`), mix remote rewards here instead.
    """

    @checked("reward")
    def __init__(self, *, url: Text, batch_size: Count, client: Client) -> None:
        self.url = check_url(url, "/score")
        self.batch_size = batch_size
        self.client = client

    def examine(self) -> None:
        """Ask whether the server is there and takes the token, with a request of no images, which
        it refuses as such.

        Raises Unavailable where nothing answers, and Unfit for anything but a scoring server.
        """
        status, content = self.client.probe(f"{self.url}/health")
        is_healthy = status == 200 and is_object(content)
        if not is_healthy and status not in ABSENT:
            raise Unfit(
                f"{self.url}/health answers HTTP {status} {content[:60]!r}, as no scoring server "
                "does",
                "url",
            )
        try:
            status, _ = self.client.probe(f"{self.url}/score", {"images": [], "prompts": []})
        except Unavailable:
            if is_healthy:  # busy, or put out by such a request
                return
            raise
        if status in ABSENT:
            raise Unfit(f"{self.url}/score answers HTTP {status}, as no scoring server does", "url")

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        rows = list(batches(len(prompts), self.batch_size))
        requests = [wire.request(images[batch], prompts[batch]) for batch in rows]
        # All requests are under way together, up to the client's `concurrency`.
        answers = self.client.post_all(f"{self.url}/score", requests)
        outputs = []
        for batch, answer in zip(rows, answers, strict=True):
            outputs.append(self._read(answer, len(prompts[batch])))
        output = concatenate(outputs)
        num_missing = int((~output.is_valid).sum())
        if num_missing:
            # Said once a call: a service that is away gives every request the same reason.
            log.warning(
                "%s: %d of %d samples are missing; the first: %s",
                self.url,
                num_missing,
                len(prompts),
                first_reason(output.info),
            )
        return output

    def _read(self, answer: bytes | Unanswered, count: int) -> RewardOutput:
        """Return the scores in an answer; all samples are missing where there is none."""
        if isinstance(answer, Unanswered):
            return missing(count, str(answer))
        try:
            return wire.read_answer(answer, count)
        except ValueError as error:
            return missing(count, f"{self.url}: unusable answer: {error}")
