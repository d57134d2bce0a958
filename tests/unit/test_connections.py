"""Connections on which nothing happens are let go before a request is refused for them."""

import json
import socket
import time

import pytest
from serving_app import IMAGES, PROMPTS, closed, connect, post, running

from flowrl.rewards import wire
from flowrl.serving.uploads import GRACE


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
