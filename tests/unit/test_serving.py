"""The server's pages over a real socket."""

import json
import threading
import time

import httpx
import pytest
import torch
from servers import brightness, remote
from serving_app import IMAGES, LEVELS, PROMPTS, answers, connect, head, post, running, total, until

from flowrl.rewards import wire
from flowrl.rewards.outputs import missing


def test_scores_arrive_as_if_scored_here():
    """Up to 8 bits, with parts, however the images are split. Mutation: mix up the requests that
    share a batch.
    """
    with running() as (url, counters):
        for batch_size in (1, 2, 6):
            output = remote(url, batch_size=batch_size)(IMAGES, PROMPTS)
            assert output.is_valid.all()
            assert output.values.tolist() == pytest.approx(LEVELS)
            assert output.parts["twice"].tolist() == pytest.approx([2 * level for level in LEVELS])
        assert total(counters, "images") == 18 and total(counters, "missing") == 0
        assert total(counters, "batches") < 3 * 6


def test_what_the_server_refuses_and_that_it_stays_up():
    """Token, body with and without a declared length, bomb, garbage, wrong page. Mutation: let any
    of them through.
    """
    good = json.dumps(wire.request(IMAGES[:2], PROMPTS[:2])).encode()
    with running(token="s3cret") as (url, counters):
        key = {"Authorization": "Bearer s3cret"}
        assert post(url, good).status_code == 401
        assert post(url, good, Authorization="Bearer wrong").status_code == 401
        assert post(url, good, Authorization="Bearer s3crét".encode()).status_code == 401
        assert post(url, b" " * 30_000, **key).status_code == 413
        assert post(url, iter([b" " * 1000] * 30), **key).status_code == 413
        assert post(url, b"[" * 900, **key).status_code == 422
        bomb = json.dumps(wire.request(torch.zeros(1, 3, 15, 15), PROMPTS[:1])).encode()
        refusal = post(url, bomb, **key)
        assert refusal.status_code == 413 and "15 x 15 takes 675 bytes" in refusal.json()["error"]
        assert httpx.get(f"{url}/score", trust_env=False).status_code == 405
        assert post(url, good, **key).json()["values"] == pytest.approx(LEVELS[:2])
        assert answers(counters) == {401: 3, 413: 3, 422: 1, 200: 1}


def test_a_body_that_never_ends_is_given_up():
    """Mutation: wait for it."""
    with running() as (url, counters):
        with connect(url, head(100) + b"{") as connection:
            assert b"408" in connection.recv(100)
        assert total(counters, "requests", status=408) == 1


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
        while (
            httpx.get(f"{url}/health", trust_env=False).json()["waiting"] != 2
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        health = httpx.get(f"{url}/health", trust_env=False).json()
        release.set()
        asking.join()
        page = httpx.get(f"{url}/metrics", trust_env=False)
    assert health == {"status": "ok", "reward": "Test", "waiting": 2}
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.text.splitlines()
    expected = [
        'flowrl_requests_total{status="200"} 1.0',
        "flowrl_waiting_images 0.0",
        "flowrl_images_total 2.0",
        "flowrl_missing_total 2.0",
        "flowrl_batches_total 1.0",
        'flowrl_batch_images_bucket{le="1.0"} 0.0',
        'flowrl_batch_images_bucket{le="2.0"} 1.0',
        "flowrl_request_seconds_count 1.0",
        "flowrl_scoring_seconds_count 1.0",
    ]
    assert set(expected) <= set(lines)
    assert not any("_created" in line for line in lines)


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

    data = [
        json.dumps(wire.request(IMAGES[i : i + 2], PROMPTS[i : i + 2])).encode() for i in (0, 2, 4)
    ]
    with running(slow, max_waiting=4) as (url, counters):
        first = connect(url, head(len(data[0])) + data[0])
        assert begun.wait(3)
        second = connect(url, head(len(data[1])) + data[1])
        until(lambda: counters.waiting == 4)
        until(lambda: counters.body_bytes == 0)  # what is decoded is held once
        assert post(url, data[2]).status_code == 503
        first.close()
        second.close()
        until(lambda: counters.waiting == 0)
        threading.Timer(0.1, release.set).start()
        assert post(url, data[2]).json()["values"] == pytest.approx(LEVELS[4:])
        assert seen == [["prompt 0", "prompt 1"], ["prompt 4", "prompt 5"]]
        assert answers(counters) == {499: 2, 503: 1, 200: 1}


def test_as_many_requests_are_read_at_a_time_as_is_allowed(monkeypatch):
    """Also where a client leaves meanwhile. Mutation: no bound, or a turn that ends with its
    client.
    """
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
        assert answers(counters) == {499: 1, 200: 6}
    assert most == 2


def test_pages_are_answered_while_no_request_has_room():
    """Mutation: count /health against the requests."""
    with running(max_connections=1) as (url, counters), connect(url, head(100) + b"{"):
        until(lambda: counters.body_bytes == 1)
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        assert "flowrl_body_bytes 1.0" in httpx.get(f"{url}/metrics", trust_env=False).text
