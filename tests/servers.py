"""Servers that tests start: the real one as a process, and a thread that answers as it is told."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import torch

from flowrl.rewards import wire
from flowrl.rewards.client import Client
from flowrl.rewards.remote import Remote
from flowrl.types import RewardOutput

ROOT = Path(__file__).parents[1]


def client(**changes):
    settings = {
        "timeout": 5.0,
        "deadline": 60.0,
        "retries": 2,
        "backoff": 0.01,
        "max_backoff": 0.02,
        "concurrency": 4,
        "open_after": 100,
        "open_seconds": 60.0,
        "max_answer": 1 << 20,
        "token_env": None,
    }
    return Client(**settings | changes)


def remote(url, batch_size=2, **changes):
    return Remote(url=url, batch_size=batch_size, client=client(**changes))


def healthy(handler):
    """What a scoring server and a judge say to GET."""
    reply(handler, {"status": "ok", "data": [{"id": "vlm"}]})


@contextmanager
def answering(behave, port=0, get=healthy, put=None):
    """A server in a thread; `behave(handler, body)` answers each POST, `get(handler)` each GET, and
    `put` each PUT as `behave` does. Gives its address.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            get(self)

        def do_POST(self):
            behave(self, whole_body(self))

        def do_PUT(self):
            put(self, whole_body(self))

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # clients that hang up are part of the tests

    server = Server(("127.0.0.1", port), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def whole_body(handler):
    """A request's body, which comes in chunks where its length was not known when it began."""
    if handler.headers.get("Transfer-Encoding") != "chunked":
        return handler.rfile.read(int(handler.headers["Content-Length"]))
    body = b""
    while size := int(handler.rfile.readline(), 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body


def reply(handler, body, status=200, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def cut(handler, body):
    """The connection ends in the middle of the body."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"values": [')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def read(body):
    """A request's body, within limits that no test reaches."""
    return wire.read_request(
        body, max_images=1000, max_image_bytes=1 << 26, max_decoded_bytes=1 << 28
    )


def scorer(reward):
    """Answers as the real server would, without its process."""

    def behave(handler, body):
        asked = read(body)
        reply(handler, wire.answer(reward(asked.images(), asked.prompts)))

    return behave


def brightness(images, prompts):
    """A scorer for tests: each image's mean."""
    values = images.mean((1, 2, 3))
    return RewardOutput(values, torch.ones(len(prompts), dtype=torch.bool), {"twice": 2 * values})


class Misbehaving:
    """A scorer for the real server, which does what the first prompt says."""

    def __init__(self, *, patience):
        self.patience = patience

    def __call__(self, images, prompts):
        import time

        word = prompts[0].text
        if word == "raise":
            raise RuntimeError("out of memory")
        if word == "slow":
            time.sleep(self.patience)
        output = brightness(images, prompts)
        if word == "nan":
            output.values[:] = torch.nan
        return brightness(images[:1], prompts[:1]) if word == "short" else output


class Process:
    """scripts/serve_reward.py on a free port, or on `port`."""

    def __init__(self, *overrides, port=0, env=()):
        command = [
            sys.executable,
            str(ROOT / "scripts" / "serve_reward.py"),
            f"port={port}",
            *overrides,
        ]
        paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths} | dict(env),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.line = self.process.stdout.readline()
        assert self.line.startswith("serving "), self.process.stderr.read()
        self.url = self.line.split()[3].removesuffix("/score")
        self.port = int(self.url.rsplit(":", 1)[1])

    def stop(self, how=signal.SIGTERM):
        """Send a signal; the exit status and what stood on standard error."""
        self.process.send_signal(how)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err
