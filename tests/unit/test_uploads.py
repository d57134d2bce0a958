"""Bodies that arrive slowly make room for others, and all of them together are bounded."""

import asyncio
import json
import time

from serving_app import IMAGES, PROMPTS, answers, connect, head, post, running, until

from flowrl.rewards import wire
from flowrl.serving.counters import Counters
from flowrl.serving.uploads import GRACE, Busy, Uploads


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
