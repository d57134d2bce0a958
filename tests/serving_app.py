"""The reward server's application in a thread, and requests to it byte by byte."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import torch
import uvicorn
from servers import brightness

from flowrl.serving.app import Limits, Pages, build_app
from flowrl.serving.batcher import Batcher
from flowrl.serving.connections import Connection
from flowrl.serving.counters import Counters
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


def closed(connection):
    """True once the server has closed it."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


def until(is_so):
    deadline = time.monotonic() + 3
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert is_so()
