"""Requests that wait together share the scorer's calls, up to bounds."""

import asyncio
import threading

import pytest
import torch
from servers import brightness
from serving_app import LEVELS, PIXELS, PROMPTS, batcher

from flowrl.rewards.outputs import missing
from flowrl.serving.uploads import Busy


def together(score, requests, **settings):
    """Several requests at once; their outputs, and the sizes of the scorer's calls."""
    sizes = []

    def noting(images, prompts):
        sizes.append(tuple(images.shape[::3]))
        return score(images, prompts)

    async def ask(own, pixels, prompts):
        with own.place(len(prompts), pixels.nbytes):
            return await own.score(pixels, prompts)

    async def run():
        own = batcher(noting, **settings)
        task = asyncio.create_task(own.run())
        outputs = await asyncio.gather(
            *(ask(own, *request) for request in requests), return_exceptions=True
        )
        task.cancel()
        return outputs

    return asyncio.run(run()), sizes


def test_requests_share_calls_by_size_and_up_to_a_bound():
    """2 + 1 + 2 images of one size and 1 of another; 6 at most 4 at a time. Mutation: merge sizes,
    exceed the bound.
    """
    requests = [
        (PIXELS[:2], PROMPTS[:2]),
        (PIXELS[2:3], PROMPTS[2:3]),
        (torch.full((1, 3, 5, 5), 255, dtype=torch.uint8), PROMPTS[:1]),
    ]
    outputs, sizes = together(brightness, [*requests, (PIXELS[3:5], PROMPTS[3:5])], max_batch=6)
    assert sizes == [(5, 4), (1, 5)]
    values = [value for i in (0, 1, 3) for value in outputs[i].values.tolist()]
    assert values == pytest.approx([0, 0.2, 0.4, 0.6, 0.8]) and outputs[2].values.tolist() == [1]
    _, sizes = together(brightness, [(PIXELS, PROMPTS)], max_batch=4)
    assert sizes == [(4, 4), (2, 4)]


def test_a_call_of_the_scorer_is_bounded_in_bytes():
    """An image of 4 x 4 has 48 bytes, so 150 bytes hold three; one that is larger than the bound is
    scored alone.

    Mutation: bound calls by the number of images alone, or lose rows where a slice spans two
    requests.
    """
    requests = [(PIXELS[:2], PROMPTS[:2]), (PIXELS[2:6], PROMPTS[2:6])]
    outputs, sizes = together(brightness, requests, max_batch=6, max_batch_bytes=150)
    assert sizes == [(3, 4), (3, 4)]
    assert [value for output in outputs for value in output.values.tolist()] == pytest.approx(
        LEVELS
    )
    outputs, sizes = together(brightness, requests, max_batch=6, max_batch_bytes=1)
    assert sizes == [(1, 4)] * 6
    assert [value for output in outputs for value in output.values.tolist()] == pytest.approx(
        LEVELS
    )


def test_a_bad_image_does_not_take_other_requests_along():
    """Mutation: no second try alone."""

    def touchy(images, prompts):
        if any(prompt.text == "prompt 3" for prompt in prompts):
            return missing(len(prompts), "RuntimeError: bad image")
        return brightness(images, prompts)

    requests = [(PIXELS[i : i + 1], PROMPTS[i : i + 1]) for i in (1, 3, 5)]
    outputs, _ = together(touchy, requests)
    assert [output.is_valid.item() for output in outputs] == [True, False, True]
    assert outputs[1].info[0]["missing"] == "RuntimeError: bad image"


def test_a_fault_that_nobody_waits_for_is_logged(caplog):
    """A scorer that raises is a fault of the server's. Its request leaves while it is scored.

    Mutation: keep the error for those who still wait.
    """
    begun, release = threading.Event(), threading.Event()

    def broken(images, prompts):
        begun.set()
        release.wait(5)
        raise RuntimeError("a fault of ours")

    async def leave_and_ask_again():
        scoring = batcher(broken)
        serving = asyncio.create_task(scoring.run())
        left = asyncio.create_task(scoring.score(PIXELS[:1], PROMPTS[:1]))
        await asyncio.to_thread(begun.wait, 5)
        left.cancel()
        release.set()
        # Its turn comes once the other one's has ended.
        with pytest.raises(RuntimeError, match="a fault of ours"):
            await scoring.score(PIXELS[1:2], PROMPTS[1:2])
        serving.cancel()

    asyncio.run(leave_and_ask_again())
    told = [record for record in caplog.records if record.message == "scoring a batch failed"]
    assert len(told) == 2
    assert str(told[0].exc_info[1]) == "a fault of ours"


def test_a_full_server_says_so():
    """Also to the first request. Mutation: let memory grow without bound."""
    outputs, _ = together(brightness, [(PIXELS, PROMPTS), (PIXELS, PROMPTS)], max_waiting=7)
    assert outputs[0].is_valid.all() and isinstance(outputs[1], Busy)
    outputs, _ = together(brightness, [(PIXELS, PROMPTS)], max_waiting=5)
    assert isinstance(outputs[0], Busy)
    outputs, _ = together(
        brightness, [(PIXELS, PROMPTS), (PIXELS, PROMPTS)], max_waiting_bytes=2 * 288 - 1
    )
    assert outputs[0].is_valid.all() and "288 bytes of images are waiting" in str(outputs[1])
