"""The server's pages over a real socket, and the batcher below them."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
import uvicorn
from servers import brightness, remote

from flowrl.rewards import wire
from flowrl.rewards.outputs import missing
from flowrl.serving.app import Limits, Pages, build_app
from flowrl.serving.batcher import Batcher, Busy
from flowrl.serving.counters import Counters
from flowrl.types import Prompt

IMAGES = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4)
PROMPTS = [Prompt(f"prompt {i}") for i in range(6)]
LEVELS = [round(i * 51) / 255 for i in range(6)]


def batcher(score, counters=None, max_batch=4, max_wait=0.05, max_waiting=100):
    counters = counters or Counters()
    return Batcher(score, max_batch=max_batch, max_wait=max_wait, max_waiting=max_waiting, counters=counters)


@contextmanager
def running(score=brightness, token=None, max_waiting=100, **limits):
    """The application in a thread. Gives its address and its counters."""
    counters = Counters()
    bounds = Limits(
        **{"max_body": 20_000, "body_seconds": 0.5, "max_images": 6, "max_pixels": 200, "max_reading": 1} | limits
    )
    pages = Pages(
        name="Test",
        batcher=batcher(score, counters, max_waiting=max_waiting),
        counters=counters,
        limits=bounds,
        token=token,
    )
    config = uvicorn.Config(build_app(pages), port=0, log_level="error", access_log=False)
    place = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}", counters
    finally:
        server.should_exit = True
        thread.join()
        place.close()


def post(url, content, **headers):
    return httpx.post(f"{url}/score", content=content, headers=headers, trust_env=False)


def test_scores_arrive_as_if_scored_here():
    """Up to 8 bits, with parts, however the images are split. Mutation: mix up the requests that share a batch."""
    with running() as (url, counters):
        for batch_size in (1, 2, 6):
            output = remote(url, batch_size=batch_size)(IMAGES, PROMPTS)
            assert output.is_valid.all()
            assert output.values.tolist() == pytest.approx(LEVELS)
            assert output.parts["twice"].tolist() == pytest.approx([2 * level for level in LEVELS])
        assert counters.images == 18 and counters.missing == 0 and counters.batches < 3 * 6


def test_what_the_server_refuses_and_that_it_stays_up():
    """Token, body with and without a declared length, bomb, garbage, wrong page. Mutation: let any of them through."""
    good = json.dumps(wire.request(IMAGES[:2], PROMPTS[:2])).encode()
    with running(token="s3cret") as (url, counters):
        key = {"Authorization": "Bearer s3cret"}
        assert post(url, good).status_code == 401
        assert post(url, good, Authorization="Bearer wrong").status_code == 401
        assert post(url, good, Authorization="Bearer s3crét".encode()).status_code == 401
        assert post(url, b" " * 30_000, **key).status_code == 413
        assert post(url, iter([b" " * 1000] * 30), **key).status_code == 413
        assert post(url, b"[" * 10_000, **key).status_code == 422
        bomb = json.dumps(wire.request(torch.zeros(1, 3, 15, 15), PROMPTS[:1])).encode()
        refusal = post(url, bomb, **key)
        assert refusal.status_code == 413 and "225 pixels" in refusal.json()["error"]
        assert httpx.get(f"{url}/score", trust_env=False).status_code == 405
        assert post(url, good, **key).json()["values"] == pytest.approx(LEVELS[:2])
        assert counters.requests == {401: 3, 413: 3, 422: 1, 200: 1}


def test_a_body_that_never_ends_is_given_up():
    """Mutation: wait for it."""
    with running() as (url, counters):
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n{")
            connection.settimeout(3)
            assert b"408" in connection.recv(100)
        assert counters.requests[408] == 1


def test_health_and_metrics():
    """Answered while the scorer works. Mutation: score in the event loop."""
    release = threading.Event()

    def slow(images, prompts):
        release.wait(5)
        return missing(len(prompts), "too slow")

    with running(slow) as (url, _):
        asking = threading.Thread(target=lambda: remote(url)(IMAGES[:2], PROMPTS[:2]))
        asking.start()
        deadline = time.monotonic() + 3
        while httpx.get(f"{url}/health", trust_env=False).json()["waiting"] != 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        health = httpx.get(f"{url}/health", trust_env=False).json()
        release.set()
        asking.join()
        page = httpx.get(f"{url}/metrics", trust_env=False)
    assert health == {"status": "ok", "reward": "Test", "waiting": 2}
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    assert 'flowrl_requests_total{status="200"} 1' in lines and "flowrl_waiting_images 0" in lines
    assert "flowrl_images_total 2" in lines and "flowrl_missing_total 2" in lines and "flowrl_batches_total 1" in lines


def together(score, requests, **settings):
    """Several requests at once; their outputs, and the sizes of the scorer's calls."""
    sizes = []

    def noting(images, prompts):
        sizes.append(tuple(images.shape[::3]))
        return score(images, prompts)

    async def ask(own, images, prompts):
        with own.place(len(prompts)):
            return await own.score(images, prompts)

    async def run():
        own = batcher(noting, **settings)
        task = asyncio.create_task(own.run())
        outputs = await asyncio.gather(*(ask(own, *request) for request in requests), return_exceptions=True)
        task.cancel()
        return outputs

    return asyncio.run(run()), sizes


def test_requests_share_calls_by_size_and_up_to_a_bound():
    """2 + 1 + 2 images of one size and 1 of another; 6 at most 4 at a time. Mutation: merge sizes, exceed the bound."""
    requests = [(IMAGES[:2], PROMPTS[:2]), (IMAGES[2:3], PROMPTS[2:3]), (torch.ones(1, 3, 5, 5), PROMPTS[:1])]
    outputs, sizes = together(brightness, [*requests, (IMAGES[3:5], PROMPTS[3:5])], max_batch=6)
    assert sizes == [(5, 4), (1, 5)]
    values = [value for i in (0, 1, 3) for value in outputs[i].values.tolist()]
    assert values == pytest.approx([0, 0.2, 0.4, 0.6, 0.8]) and outputs[2].values.tolist() == [1]
    _, sizes = together(brightness, [(IMAGES, PROMPTS)], max_batch=4)
    assert sizes == [(4, 4), (2, 4)]


def test_a_bad_image_does_not_take_other_requests_along():
    """Mutation: no second try alone."""

    def touchy(images, prompts):
        if any(prompt.text == "prompt 3" for prompt in prompts):
            return missing(len(prompts), "RuntimeError: bad image")
        return brightness(images, prompts)

    requests = [(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in (1, 3, 5)]
    outputs, _ = together(touchy, requests)
    assert [output.is_valid.item() for output in outputs] == [True, False, True]
    assert outputs[1].info[0]["missing"] == "RuntimeError: bad image"


def test_a_full_server_says_so():
    """Also to the first request. Mutation: let memory grow without bound."""
    outputs, _ = together(brightness, [(IMAGES, PROMPTS), (IMAGES, PROMPTS)], max_waiting=7)
    assert outputs[0].is_valid.all() and isinstance(outputs[1], Busy)
    outputs, _ = together(brightness, [(IMAGES, PROMPTS)], max_waiting=5)
    assert isinstance(outputs[0], Busy)


def test_requests_whose_clients_have_left_are_not_scored():
    """The first is being scored, two more wait; their clients leave, and there is room again.

    Mutation: hear no disconnect, or score what nobody waits for.
    """
    begun, release, seen = threading.Event(), threading.Event(), []

    def slow(images, prompts):
        seen.append([prompt.text for prompt in prompts])
        begun.set()
        release.wait(5)
        return brightness(images, prompts)

    data = [json.dumps(wire.request(IMAGES[i : i + 2], PROMPTS[i : i + 2])).encode() for i in (0, 2, 4)]
    with running(slow, max_waiting=4) as (url, counters):

        def until(waiting):
            deadline = time.monotonic() + 3
            while counters.waiting != waiting and time.monotonic() < deadline:
                time.sleep(0.005)
            assert counters.waiting == waiting

        def connect(body):
            connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
            head = f"POST /score HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            return connection

        first = connect(data[0])
        assert begun.wait(3)
        second = connect(data[1])
        until(4)
        assert post(url, data[2]).status_code == 503
        first.close()
        second.close()
        until(0)
        threading.Timer(0.1, release.set).start()
        assert post(url, data[2]).json()["values"] == pytest.approx(LEVELS[4:])
        assert seen == [["prompt 0", "prompt 1"], ["prompt 4", "prompt 5"]]
        assert counters.requests == {499: 2, 503: 1, 200: 1}


def test_as_many_requests_are_read_at_a_time_as_is_allowed(monkeypatch):
    """Also where a client leaves meanwhile. Mutation: no bound, or a turn that ends with its client."""
    lock, now, most = threading.Lock(), 0, 0
    original = wire.read_request

    def slow(*args, **bounds):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return original(*args, **bounds)

    monkeypatch.setattr(wire, "read_request", slow)
    data = json.dumps(wire.request(IMAGES[:1], PROMPTS[:1])).encode()
    with running(max_reading=2) as (url, counters):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/score", content=data, timeout=0.02, trust_env=False)
        threads = [threading.Thread(target=post, args=(url, data)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counters.requests == {499: 1, 200: 6}
    assert most == 2


@pytest.mark.parametrize("name", ["max_body", "body_seconds", "max_images", "max_pixels", "max_reading"])
def test_limits_are_checked(name):
    """Mutation: drop the check."""
    with pytest.raises(ValueError, match=f"{name}=0"):
        Limits(**{"max_body": 1, "body_seconds": 1.0, "max_images": 1, "max_pixels": 1, "max_reading": 1} | {name: 0})
