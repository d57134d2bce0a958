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

from flowrl.errors import UserError
from flowrl.rewards import wire
from flowrl.rewards.outputs import all_valid, missing
from flowrl.serving.app import Limits, Pages, build_app
from flowrl.serving.batcher import Batcher
from flowrl.serving.connections import Connection
from flowrl.serving.counters import Counters
from flowrl.serving.server import bind, serve
from flowrl.serving.uploads import GRACE, Busy, Uploads
from flowrl.types import Prompt

IMAGES = torch.linspace(0, 1, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4)
PROMPTS = [Prompt(f"prompt {i}") for i in range(6)]
PIXELS = (IMAGES * 255).round().byte()
LEVELS = [round(i * 51) / 255 for i in range(6)]


def batcher(score, counters=None, **changes):
    bounds = {
        "max_batch": 4,
        "max_batch_bytes": 10**6,
        "max_wait": 0.05,
        "max_waiting": 100,
        "max_waiting_bytes": 10**6,
    }
    return Batcher(score, counters=counters or Counters(), **bounds | changes)


LIMITS = {
    "max_body": 20_000,
    "body_seconds": 0.5,
    "min_rate": 10_000,
    "max_images": 6,
    "max_image_bytes": 600,
    "max_decoded_bytes": 100_000,
    "max_reading": 1,
    "max_reading_bytes": 50_000,
}


@contextmanager
def running(
    score=brightness, token=None, max_waiting=100, max_connections=100, idle_seconds=5, **limits
):
    """The application in a thread. Gives its address and its counters."""
    counters = Counters()
    pages = Pages(
        name="Test",
        batcher=batcher(score, counters, max_waiting=max_waiting),
        counters=counters,
        limits=Limits(**LIMITS | limits),
        max_requests=max_connections,
        token=token,
    )
    config = uvicorn.Config(
        build_app(pages),
        port=0,
        http=Connection,
        log_level="error",
        access_log=False,
        limit_concurrency=max_connections,
        timeout_keep_alive=idle_seconds,
        timeout_graceful_shutdown=2,
    )
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


def total(counters, name, **labels):
    """What a counter stands at."""
    labels = {key: str(value) for key, value in labels.items()}
    return counters.registry.get_sample_value(f"flowrl_{name}_total", labels)


def answers(counters):
    """How many answers of each status were given."""
    statuses = (200, 401, 408, 413, 422, 499, 500, 503)
    told = {status: total(counters, "requests", status=status) for status in statuses}
    return {status: count for status, count in told.items() if count}


def connect(url, data=b""):
    """A connection on which `data` was sent."""
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    connection.settimeout(5)
    connection.sendall(data)
    return connection


def head(length):
    return f"POST /score HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n".encode()


def post(url, content, **headers):
    return httpx.post(f"{url}/score", content=content, headers=headers, trust_env=False)


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


def test_idle_connections_are_closed():
    """One that sends nothing, one that sends a head byte by byte, and one that was answered.

    Mutation: wait for a first byte, or begin the time anew with each byte.
    """
    with running(idle_seconds=1) as (url, _):
        silent, slow = connect(url), connect(url, b"GET /health HTTP/1.1\r\n")
        answered = connect(url, b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
        begin = time.monotonic()
        while time.monotonic() - begin < 0.8:
            time.sleep(0.1)
            slow.sendall(b"X")
        assert b"200" in answered.recv(1000)
        for connection in (silent, slow, answered):
            assert closed(connection)
            connection.close()
        assert 0.8 < time.monotonic() - begin < 2


def closed(connection):
    """True once the server has closed it."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_client_that_does_not_read_is_let_go():
    """Thousands of questions in one go whose answers fill every buffer. Mutation: wait until there
    is room.
    """
    with running(idle_seconds=1) as (url, _):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        connection.settimeout(5)
        begin = time.monotonic()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while time.monotonic() - begin < 10:
                connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n" * 100)
        connection.close()


def test_idle_connections_do_not_count_against_requests():
    """Twice as many as requests may be under way, and none of them ends soon; then the longest idle
    one goes first.

    Mutation: refuse requests while so many connections are open, or let any number stay.
    """
    good = json.dumps(wire.request(IMAGES[:2], PROMPTS[:2])).encode()
    with running(max_connections=3, idle_seconds=60) as (url, _):
        idle = [connect(url) for _ in range(6)]
        assert [post(url, good).status_code for _ in range(4)] == [200] * 4
        time.sleep(GRACE)
        for _ in range(3):
            assert post(url, good).status_code == 200
        assert all(closed(connection) for connection in idle[:3])
        idle[5].settimeout(0.1)
        with pytest.raises(TimeoutError):
            idle[5].recv(1)
        for connection in idle:
            connection.close()


def test_a_body_that_stands_still_makes_room_for_requests():
    """Two requests may be under way, and two are held back by a byte: others are refused at first,
    then served.

    Mutation: let them stay until `body_seconds`, or give up one that only just arrived.
    """
    good = json.dumps(wire.request(IMAGES[:2], PROMPTS[:2])).encode()
    with running(max_connections=2, body_seconds=60.0) as (url, counters):
        with (
            connect(url, head(len(good)) + good[:-1]) as first,
            connect(url, head(len(good)) + good[:-1]) as second,
        ):
            until(lambda: counters.body_bytes == 2 * len(good) - 2)
            refusal = post(url, good)
            assert refusal.status_code == 503 and refusal.headers["Retry-After"] == "1"
            assert "2 requests are under way" in refusal.json()["error"]
            time.sleep(GRACE)
            assert post(url, good).status_code == 200
            assert b"503" in first.recv(20)
            second.sendall(good[-1:])
            assert b"200" in second.recv(20)
        until(lambda: counters.body_bytes == 0)


def test_the_bytes_of_all_bodies_are_bounded():
    """Three of 20,000 bytes do not go into 50,000: the third is refused while the others' bytes are
    new.

    One that then comes takes the place of one that stands still. Mutation: bound each alone, or
    lose count of what is held when clients leave.
    """
    body = b" " * 19_999
    with running(body_seconds=60.0) as (url, counters):
        first = connect(url, head(20_000) + body)
        second = connect(url, head(20_000) + body)
        until(lambda: counters.body_bytes == 39_998)
        refusal = post(url, body)
        assert (
            refusal.status_code == 503 and "39998 bytes are held already" in refusal.json()["error"]
        )
        assert counters.body_bytes == 39_998
        time.sleep(GRACE)
        assert post(url, body).status_code == 422
        assert b"503" in first.recv(20)
        until(lambda: counters.body_bytes == 19_999)
        first.close()
        second.close()
        until(lambda: counters.body_bytes == 0)
        assert answers(counters) == {503: 2, 422: 1, 499: 1}


class Client:
    """A client of `Uploads` that sends what it is told to. `refusal` is what it was refused
    with.
    """

    def __init__(self, uploads):
        self.uploads, self.pieces, self.refusal = uploads, asyncio.Queue(), None
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        try:
            with self.uploads.admitted() as upload:
                async with self.uploads.receiving(upload, 600):
                    while num_bytes := await self.pieces.get():
                        self.uploads.add(upload, num_bytes)
        except Busy as error:
            self.refusal = str(error)

    async def send(self, num_bytes):
        """Send a piece, and let the server take it; none ends the body."""
        self.pieces.put_nowait(num_bytes)
        await turns()


async def turns():
    for _ in range(10):
        await asyncio.sleep(0.001)


def with_uploads(scenario, **bounds):
    """Run a scenario with uploads of at least 1,000 bytes a second, and a clock that it sets."""
    clock = [100.0]
    counters = Counters()
    uploads = Uploads(min_rate=1000, counters=counters, clock=lambda: clock[0], **bounds)

    async def run():
        await scenario(uploads, clock)

    asyncio.run(run())
    assert counters.body_bytes == 0 and not uploads.uploads


def test_a_drip_does_not_hold_the_bytes():
    """Most of the room is taken at once, then a byte comes every 0.4 s: 2.5 bytes a second of 1,000
    make room.

    Mutation: give up only what has stood still, or go by the mean rate since the start, which stays
    high for minutes.
    """

    async def scenario(uploads, clock):
        drip = Client(uploads)
        await drip.send(900_000)
        early = Client(uploads)
        await early.send(200_000)
        assert "900000 bytes are held already" in early.refusal
        for _ in range(3):
            clock[0] += 0.4
            await drip.send(1)
        other = Client(uploads)
        await other.send(200_000)
        assert "slower than min_rate=1000 bytes a second" in drip.refusal
        await other.send(0)
        assert other.task.done() and other.refusal is None

    with_uploads(scenario, max_requests=10, max_bytes=1_000_000)


def test_drips_do_not_hold_the_places_and_a_steady_client_stays():
    """Of three places two drip, one slower than the other, and the third has 1,200 bytes a second
    of 1,000.

    The slower drip goes first, then the other; the steady one stays, after 20 seconds too, and
    newcomers are refused. Mutation: give up the oldest, the one with the fewest bytes, or one above
    the least rate.
    """

    async def scenario(uploads, clock):
        steady, slow, slower = Client(uploads), Client(uploads), Client(uploads)
        for _ in range(50):
            clock[0] += 0.4
            await slow.send(100)
            await slower.send(1)
            await steady.send(480)
        newcomers = []
        for _ in range(3):
            newcomers.append(Client(uploads))
            await turns()
            if len(newcomers) == 1:
                assert slower.refusal and not slow.refusal
        assert slow.refusal and not steady.refusal
        assert [client.refusal for client in newcomers[:2]] == [None, None]
        assert newcomers[2].refusal == "3 requests are under way already; try again later"
        for client in (steady, *newcomers[:2]):
            await client.send(0)
            assert client.task.done() and client.refusal is None

    with_uploads(scenario, max_requests=3, max_bytes=1_000_000)


def test_a_drip_that_asks_for_room_is_given_up_itself():
    """It is further behind than one that is slow too. Mutation: let each byte of a drip displace
    somebody faster.
    """

    async def scenario(uploads, clock):
        drip, slow = Client(uploads), Client(uploads)
        await drip.send(400)
        await slow.send(400)
        clock[0] += 1.5
        await slow.send(150)
        await drip.send(100)
        assert drip.refusal == "bodies of 950 bytes are held already; try again later"
        await slow.send(0)
        assert slow.task.done() and slow.refusal is None

    with_uploads(scenario, max_requests=3, max_bytes=1000)


def until(is_so):
    deadline = time.monotonic() + 3
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_so()


def test_pages_are_answered_while_no_request_has_room():
    """Mutation: count /health against the requests."""
    with running(max_connections=1) as (url, counters), connect(url, head(100) + b"{"):
        until(lambda: counters.body_bytes == 1)
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        assert "flowrl_body_bytes 1.0" in httpx.get(f"{url}/metrics", trust_env=False).text


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_checked(name):
    """Mutation: drop the check."""
    with pytest.raises(ValueError, match=rf"limits\.{name}=0"):
        Limits(**LIMITS | {name: 0})


@pytest.mark.parametrize(
    ("lower", "upper"), [("max_body", "reading"), ("max_image_bytes", "decoded")]
)
def test_a_limit_on_one_is_at_most_that_on_all(lower, upper):
    """Else no request could use it. Mutation: drop the check."""
    with pytest.raises(
        ValueError, match=rf"limits\.{lower}=1000000 must be at most limits\.max_{upper}_bytes"
    ):
        Limits(**LIMITS | {lower: 10**6})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_waiting": 5}, r"limits\.max_images=6 must be at most max_waiting=5"),
        (
            {"max_batch_bytes": 599},
            r"limits\.max_image_bytes=600 must be at most max_batch_bytes=599",
        ),
        (
            {"max_waiting_bytes": 99_999},
            r"limits\.max_decoded_bytes=100000 must be at most max_waiting_bytes=99999",
        ),
        ({"idle_seconds": 0}, "idle_seconds=0 must be a whole number of at least 1"),
        ({"shutdown_seconds": 2.9}, r"shutdown_seconds=2\.9 must be a whole number of at least 1"),
        ({"shutdown_seconds": 0}, "shutdown_seconds=0 must be a whole number of at least 1"),
        ({"max_wait": -0.1}, r"max_wait=-0\.1 must be a number of at least 0"),
        ({"max_batch_bytes": 0}, "max_batch_bytes=0 must be a whole number of at least 1"),
        ({"max_waiting": 2.5}, r"max_waiting=2\.5 must be a whole number of at least 1"),
        ({"max_waiting_bytes": 2**41}, f"max_waiting_bytes={2**41} must be .* at most {2**40}"),
    ],
)
def test_a_server_does_not_start_with_limits_that_contradict_each_other(change, words, monkeypatch):
    """Each request would be refused for ever. Mutation: drop a check."""
    # One that starts all the same ends at once.
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: None)
    settings = {
        "host": "127.0.0.1",
        "port": 0,
        "device": "cpu",
        "max_batch": 4,
        "max_batch_bytes": 10**6,
        "max_wait": 0.0,
        "max_waiting": 100,
        "max_waiting_bytes": 10**6,
        "max_connections": 10,
        "idle_seconds": 10,
        "shutdown_seconds": 1,
        "token_env": None,
    }
    with pytest.raises(ValueError, match=words):
        serve(brightness, limits=Limits(**LIMITS), **settings | change)


SERVER = {
    "host": "127.0.0.1",
    "port": 0,
    "device": "cpu",
    "max_batch": 1,
    "max_batch_bytes": 10**9,
    "max_wait": 0.0,
    "max_waiting": 10**6,
    "max_waiting_bytes": 10**12,
    "max_connections": 1,
    "idle_seconds": 1,
    "shutdown_seconds": 1,
    "token_env": None,
}


def test_a_scorer_of_whole_groups_is_not_served():
    """Mutation: let it compare the pictures of different requests with each other."""

    class Rank:
        whole_groups = True

        def __call__(self, images, prompts):
            return all_valid(torch.zeros(len(prompts)))

    with pytest.raises(UserError, match="Rank compares the images of a prompt, and requests are"):
        serve(reward=Rank(), limits=Limits(**LIMITS), **SERVER)


def test_a_scorer_of_whole_clips_is_not_served():
    """Mutation: hand it each picture of a request as a clip."""

    class Change:
        whole_clips = True

        def __call__(self, images, prompts):
            return all_valid(torch.zeros(len(prompts)))

    with pytest.raises(UserError, match="Change takes whole clips, and requests carry images"):
        serve(reward=Change(), limits=Limits(**LIMITS), **SERVER)


def test_a_port_that_is_taken_is_named_with_the_remedy():
    """Mutation: let uvicorn log the error and exit, or share the port."""
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^port={port} on host=127\.0\.0\.1: .*in use; .*port=0"
        ):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match=r"^port=70000 on host=::1: .*0-65535"):
        bind("::1", 70000)
