"""Trouble for a reward server: image bombs, slow clients, many connections. Prints its memory and
answers as a table.

    python scripts/load_reward_server.py
    python scripts/load_reward_server.py bomb idle limits.max_image_bytes=4194304

Each case has a server of its own, scripts/serve_reward.py reward=shapes with the overrides that are
given. Memory is the resident set of its process before the case and at the peak (Linux). "Others"
is a well-behaved client that sends 20 requests during the case, one after the other.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import asyncio
import base64
import io
import json
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

MIB = 1 << 20
SECONDS = 120.0
"""The time after which an answer counts as `none`."""


@dataclass
class Answers:
    """The answers to a case's requests, and the seconds that each took."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        statuses = sorted(self.statuses.items())
        counts = ", ".join(f"{count} x {status}" for status, count in statuses)
        if not self.seconds:
            return counts or "-"
        median = np.median(self.seconds)
        longest = max(self.seconds)
        return f"{counts}; median {median:.3f} s, longest {longest:.3f} s"


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    port: int

    def memory(self, name: str) -> float:
        """Return VmRSS (now) or VmHWM (peak), in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith(name):
                kibibytes = int(line.split()[1])
                return kibibytes / 1024
        raise RuntimeError(f"no {name} in the status of process {self.process.pid}")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def post(self, body: bytes, answers: Answers) -> str:
        """Send a request on a new connection, and return the status that it got, or `none`."""
        start = time.perf_counter()
        try:
            async with asyncio.timeout(SECONDS):
                status = await self._post(body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            status = "none"
        answers.statuses[status] += 1
        answers.seconds.append(time.perf_counter() - start)
        return status

    async def _post(self, body: bytes) -> str:
        """Send a request, and return the status as the server's first line has it."""
        reader, writer = await self.connect()
        try:
            writer.write(head(len(body)) + body)
            await writer.drain()
            # `HTTP/1.1 200`: the rest of the answer is not waited for.
            start_of_answer = await reader.readexactly(12)
            return start_of_answer[9:].decode()
        finally:
            writer.close()


Case = Callable[[Server, Answers, Answers], Awaitable[None]]


def head(length: int) -> bytes:
    """Write the head of a request whose body has so many bytes."""
    return f"POST /score HTTP/1.1\r\nHost: load\r\nContent-Length: {length}\r\n\r\n".encode()


def body(pngs: list[bytes]) -> bytes:
    """Write a request for the scores of images."""
    images = [base64.b64encode(png).decode() for png in pngs]
    prompts = [{"text": "a red circle"}] * len(pngs)
    return json.dumps({"images": images, "prompts": prompts}).encode()


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    """Write a black image."""
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def with_texts(picture: bytes, count: int) -> bytes:
    """Add compressed texts to a picture, of 1 MiB each and a kilobyte in the file."""
    text = zlib.compress(b"x" * MIB)
    chunks = [chunk(b"zTXt", b"key %d\0\0" % i + text) for i in range(count)]
    # Behind the signature and the first chunk, the image's size, which must come first.
    header = picture[:33]
    rest = picture[33:]
    return header + b"".join(chunks) + rest


def chunk(kind: bytes, data: bytes) -> bytes:
    """Write a chunk of a PNG, with its sum."""
    length = struct.pack(">I", len(data))
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return length + kind + data + checksum


SMALL = body([png(32, 32)])


async def others(server: Server, answers: Answers, count: int = 20) -> None:
    """Ask `count` times, one after the other, as a well-behaved client does."""
    for _ in range(count):
        await server.post(SMALL, answers)
        await asyncio.sleep(0.05)


async def plain(server: Server, asked: Answers, besides: Answers) -> None:
    """Let nothing happen but a well-behaved client's requests."""
    await others(server, besides)


def at_once(content: bytes, count: int) -> Case:
    """Make a case of requests that are all sent at once."""

    async def case(server: Server, asked: Answers, besides: Answers) -> None:
        requests = [server.post(content, asked) for _ in range(count)]
        await asyncio.gather(*requests, others(server, besides))

    return case


def held_back(num_connections: int, sent: bytes) -> Case:
    """Make a case of connections that send something, and then nothing more."""

    async def case(server: Server, asked: Answers, besides: Answers) -> None:
        connections = []
        for _ in range(num_connections):
            connections.append(await server.connect())
        drains = []
        for _, writer in connections:
            writer.write(sent)
            drains.append(writer.drain())
        # A server that reads no further, or closes the connection, lets this wait or fail.
        all_sent = asyncio.gather(*drains, return_exceptions=True)
        await asyncio.wait([all_sent], timeout=10)
        # Time for the server to hold what it was sent, before others ask.
        await asyncio.sleep(2)
        await others(server, besides)
        await asyncio.gather(*(end(reader, asked) for reader, _ in connections))
        # Without the usual farewell, which a full buffer would hold up.
        for _, writer in connections:
            writer.transport.abort()

    return case


async def end(reader: asyncio.StreamReader, answers: Answers) -> None:
    """Note what the server did to a connection that sent nothing more."""
    try:
        answer = await asyncio.wait_for(reader.read(12), 0.2)
        answers.statuses[answer[9:].decode() or "closed"] += 1
    except TimeoutError:
        answers.statuses["still held"] += 1
    except OSError:
        answers.statuses["closed"] += 1


async def thousand(server: Server, asked: Answers, besides: Answers) -> None:
    """Open 1,000 connections at once, each with one request, which comes again after a second where
    it is told to.
    """

    async def persist() -> None:
        start = time.perf_counter()
        while True:
            status = await server.post(SMALL, asked)
            is_late = time.perf_counter() - start >= SECONDS
            if status == "200" or is_late:
                return
            await asyncio.sleep(1)

    requests = [persist() for _ in range(1000)]
    await asyncio.gather(*requests)


LARGE = 100_000_000
CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "plain": ("nothing besides", lambda: plain),
    "bomb": ("a PNG of 8192 x 8192, 1 bit", lambda: at_once(body([png(8192, 8192, "1")]), 1)),
    "bombs": ("8 of them at once", lambda: at_once(body([png(8192, 8192, "1")]), 8)),
    "largest": (
        "8 requests of 16 such PNGs of 2048 x 2048",
        lambda: at_once(body([png(2048, 2048, "1")] * 16), 8),
    ),
    "texts": (
        "16 PNGs with 60 MiB of compressed text each",
        lambda: at_once(body([with_texts(png(8, 8), 60)] * 16), 1),
    ),
    "json": (
        "30 MB of JSON objects",
        lambda: at_once(b'{"images": [' + b"{}," * 10_000_000 + b"{}]}", 1),
    ),
    "idle": ("300 idle connections", lambda: held_back(300, b"")),
    "heads": ("300 half heads", lambda: held_back(300, b"POST /score HTTP/1.1\r\nHost: load\r\n")),
    "bodies": (
        "8 bodies of 100 MB held back by a byte",
        lambda: held_back(8, head(LARGE) + b" " * (LARGE - 1)),
    ),
    "slow": (
        "300 bodies of 100 bytes held back by a byte",
        lambda: held_back(300, head(100) + b" " * 99),
    ),
    "thousand": ("1,000 connections at once, each until it is scored", lambda: thousand),
}


@asynccontextmanager
async def running(overrides: list[str]) -> AsyncIterator[Server]:
    """Run a server of the verifier on a free port."""
    script = Path(__file__).with_name("serve_reward.py")
    words = ["reward=shapes", "port=0", "shutdown_seconds=1", *overrides]
    command = [sys.executable, str(script), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("serving "):
        sys.exit(f"error: the server did not start: {' '.join(command)}")
    # `serving NAME on http://127.0.0.1:PORT/score ...`, with the port that the system chose.
    url = line.split()[3]
    _, _, port = url.removesuffix("/score").rpartition(":")
    try:
        yield Server(process, int(port))
    finally:
        # At once: what it still has to answer is of no account, and may take minutes.
        process.send_signal(signal.SIGKILL)
        process.wait()


async def measure(name: str, overrides: list[str]) -> str:
    """Measure a case, and write its row of the table."""
    meaning, make = CASES[name]
    case = make()
    asked = Answers()
    besides = Answers()
    async with running(overrides) as server:
        # The first requests import and allocate what every later one needs.
        await others(server, Answers(), 3)
        before = server.memory("VmRSS")
        start = time.perf_counter()
        await case(server, asked, besides)
        seconds = time.perf_counter() - start
        peak = server.memory("VmHWM")
    return f"| {meaning} | {before:.0f} | {peak:.0f} | {asked} | {besides} | {seconds:.1f} |"


def main() -> None:
    """Print the table, a row a case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help=f"cases ({', '.join(CASES)}; all of them), keys of conf/serve.yaml"
    )
    words = parser.parse_args().words
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word] or list(CASES)
    unknown = ", ".join(sorted(set(names) - set(CASES)))
    if unknown:
        sys.exit(f"error: {unknown}: no such case; there are {', '.join(CASES)}")
    # A thousand connections are more files than a process may have open by default.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print("| case | MiB before | MiB at peak | its answers | others' answers | seconds |")
    print("|---|---|---|---|---|---|")
    for name in names:
        print(asyncio.run(measure(name, overrides)), flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
