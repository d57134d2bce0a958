import asyncio
import json
import logging
import re
import threading
import time
from email.utils import formatdate
from itertools import pairwise

import pytest
import torch
from servers import answering, brightness, client, cut, read, remote, reply, scorer

from flowrl.rewards import client as requests
from flowrl.rewards.client import Unanswered, Unavailable, Unfit, _seconds, check_url
from flowrl.types import Prompt

IMAGES = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 4, 4)
PROMPTS = [Prompt(f"prompt {i}") for i in range(5)]
LEVELS = [round(i * 255 / 4) / 255 for i in range(5)]


def hang(handler, body):
    time.sleep(2)


def drip(handler, body):
    """A byte now and then: no single read takes long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


FAULTS = {
    "500": (lambda h, b: reply(h, b"out of memory", 500), "HTTP 500 out of memory"),
    "401": (lambda h, b: reply(h, {"error": "wrong token"}, 401), "HTTP 401"),
    "redirect": (
        lambda h, b: reply(h, b"", 302, [("Location", "http://127.0.0.1:9/")]),
        "HTTP 302",
    ),
    "garbage": (lambda h, b: reply(h, b"<html>hello</html>"), "not JSON"),
    "too short": (lambda h, b: reply(h, {"values": [0.5]}), "2 images, but values: 1 entries"),
    "too long": (lambda h, b: reply(h, {"values": [0.5] * 9}), "9 entries"),
    "nan": (lambda h, b: reply(h, b'{"values": [NaN, NaN]}'), "no number"),
    "text": (lambda h, b: reply(h, {"values": ["0.5", "0.5"]}), "numbers or null"),
    "cut in mid-body": (cut, "peer closed|incomplete|disconnected"),
    "silent": (hang, "no answer within 0.3 s"),
    "dripping": (drip, "no answer within 0.3 s"),
    "flood": (lambda h, b: reply(h, b" " * 5000), "max_answer=3000"),
}


def test_a_question_has_one_time_limit_for_its_whole_answer(monkeypatch):
    """Mutation: a limit for each read, which bytes that drip never reach."""
    monkeypatch.setattr(requests, "PROBE_SECONDS", 0.3)
    start = time.monotonic()
    with answering(drip, get=lambda handler: drip(handler, b"")) as url:
        for body in (None, {}):
            with pytest.raises(Unavailable, match=r"^no answer within 0\.3 s$"):
                client().probe(url, body)
    assert time.monotonic() - start < 1.2


def test_an_answer_without_an_end_is_left_once_it_is_too_long():
    """Mutation: read all of it and cut it then, for which memory has no bound."""
    num_sent = 0

    def flood(handler):
        nonlocal num_sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(1 << 30))
        handler.end_headers()
        for _ in range(1 << 14):
            handler.wfile.write(b" " * (1 << 16))
            num_sent += 1 << 16

    words = r"an answer of more than client\.max_answer=3000 bytes"
    with answering(hang, get=flood) as url, pytest.raises(Unfit, match=words) as refused:
        client(max_answer=3000).probe(url)
    assert refused.value.setting == "client.max_answer"
    # What the system's buffers take, and not the gibibyte.
    assert num_sent < 1 << 26


def test_an_answer_of_the_longest_length_is_taken():
    """Mutation: a byte less."""
    with answering(hang, get=lambda handler: reply(handler, b" " * 3000)) as url:
        assert client(max_answer=3000).probe(url) == (200, b" " * 3000)


def test_a_notebooks_loop_is_no_hindrance():
    """A cell runs within a loop. Mutation: start another one in the same thread."""

    async def cell(url):
        return client().probe(url)

    with answering(hang, get=lambda handler: reply(handler, b"{}")) as url:
        assert asyncio.run(cell(url)) == (200, b"{}")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_own_samples_and_nothing_else(fault, caplog):
    """Requests of 2, 2 and 1 images; the middle one goes wrong, whatever it is tried. Its samples
    are missing, never 0.

    Mutation: raise for the whole call, score a fault 0 as valid, wait for ever, or say nothing.
    """
    misbehave, words = FAULTS[fault]

    def behave(handler, body):
        prompts = read(body).prompts
        (misbehave if prompts[0].text == "prompt 2" else scorer(brightness))(handler, body)

    start = time.monotonic()
    with answering(behave) as url, caplog.at_level(logging.WARNING):
        output = remote(url, timeout=0.3, max_answer=3000)(IMAGES, PROMPTS)
    assert time.monotonic() - start < 4
    assert output.is_valid.tolist() == [True, True, False, False, True]
    assert output.values.tolist() == pytest.approx([LEVELS[0], LEVELS[1], 0, 0, LEVELS[4]])
    assert output.parts["twice"].isnan().tolist() == [False, False, True, True, False]
    assert [bool(entry) for entry in output.info] == [False, False, True, True, False]
    assert re.search(words, output.info[2]["missing"]), output.info[2]
    assert len(caplog.records) == 1 and "2 of 5 samples are missing" in caplog.text


def test_no_server_at_all_is_missing_not_an_error():
    """Mutation: let the connection's error out."""
    with answering(scorer(brightness)) as url:
        pass
    output = remote(url)(IMAGES, PROMPTS)
    assert not output.is_valid.any() and "3 tries" in output.info[0]["missing"]


def test_a_call_ends_at_its_deadline_however_many_requests_hang():
    """Five requests, one at a time, each of which would be tried twice for 0.3 s: given up after 1
    s.

    The two that were being asked count as failures of the service, those that waited for their turn
    do not. Mutation: a deadline for each request, or none between its tries, or one that opens the
    circuit for what waited.
    """
    with answering(hang) as url:
        reward = remote(
            url, batch_size=1, timeout=0.3, deadline=1.0, retries=1, concurrency=1, open_after=3
        )
        start = time.monotonic()
        output = reward(IMAGES, PROMPTS)
        assert 0.9 < time.monotonic() - start < 2.5
        assert not output.is_valid.any() and reward.client.failures_in_a_row == 2
    assert "no answer within 0.3 s (2 tries)" in output.info[0]["missing"]
    assert (
        "deadline=1.0 s" in output.info[1]["missing"]
        and "deadline=1.0 s" in output.info[4]["missing"]
    )


def test_what_may_pass_is_tried_again():
    """Two failures of different kinds, then an answer. Mutation: one retry less, or none after a
    cut.
    """
    asked = []

    def behave(handler, body):
        asked.append(time.monotonic())
        [
            lambda: reply(handler, b"", 503),
            lambda: cut(handler, body),
            lambda: scorer(brightness)(handler, body),
        ][len(asked) - 1]()

    with answering(behave) as url:
        output = remote(url, batch_size=5, backoff=0.1, max_backoff=1.0)(IMAGES, PROMPTS)
    assert output.is_valid.all() and len(asked) == 3
    pauses = [b - a for a, b in pairwise(asked)]
    assert 0.05 <= pauses[0] < 0.4 and 0.1 <= pauses[1] < 0.6


def test_a_server_that_asks_for_a_pause_gets_it():
    """As FlowRL's own does where it is full. Mutation: come again after the usual pause."""
    asked = []

    def behave(handler, body):
        asked.append(time.monotonic())
        if len(asked) == 1:
            reply(handler, b"", 503, [("Retry-After", "1")])
        else:
            scorer(brightness)(handler, body)

    with answering(behave) as url:
        output = remote(url, batch_size=5)(IMAGES, PROMPTS)
    assert output.is_valid.all()
    assert 1.0 <= asked[1] - asked[0] < 3.0


def test_a_pause_is_asked_for_in_seconds_or_by_a_date(monkeypatch):
    """Mutation: take a date, or nonsense, for an error that ends the run."""
    moment = 1_700_000_000.0
    monkeypatch.setattr("flowrl.rewards.client.time.time", lambda: moment)
    ahead = formatdate(moment + 30, usegmt=True)
    told = {"120": 120, " 7 ": 7, ahead: 30, formatdate(moment - 30): 0, "soon": 0, "-5": 0}
    assert {text: _seconds(text) for text in told} == told
    assert _seconds(None) == 0


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refusal_is_final(status):
    """Mutation: retry whatever is no success."""
    asked = []

    def behave(handler, body):
        asked.append(1)
        reply(handler, {"error": "no"}, status)

    with answering(behave) as url:
        assert not remote(url, batch_size=5)(IMAGES, PROMPTS).is_valid.any()
    assert len(asked) == 1


def test_the_circuit_opens_is_probed_and_closes():
    """Two failed requests open it: the next cost nothing. After a while one try each, and an answer
    closes it.

    Mutation: never open, never close, or retry while probing.
    """
    asked, is_up = [], [False]

    def behave(handler, body):
        asked.append(1)
        reply(handler, {"values": [1.0]} if is_up[0] else b"", 200 if is_up[0] else 503)

    with answering(behave) as url:
        service = client(retries=1, open_after=2, open_seconds=0.3, concurrency=1)

        def post(times=1):
            asked.clear()
            return [
                isinstance(answer, Unanswered)
                for answer in service.post_all(f"{url}/score", [{}] * times)
            ]

        assert post(5) == [True] * 5 and len(asked) == 4
        assert post(5) == [True] * 5 and len(asked) == 0
        time.sleep(0.35)
        assert post(2) == [True] * 2 and len(asked) == 1
        time.sleep(0.35)
        is_up[0] = True
        assert post(3) == [False] * 3 and len(asked) == 3
        is_up[0] = False
        assert post(1) == [True] and len(asked) == 2


def test_requests_go_out_side_by_side_and_come_back_in_order():
    """At most two at a time; the first is the slowest. Mutation: one after the other, or in the
    order of arrival.
    """
    lock, now, most = threading.Lock(), [0], [0]

    def behave(handler, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        images = read(body).images()
        time.sleep(0.3 if images.mean() == 0 else 0.05)
        with lock:
            now[0] -= 1
        reply(handler, {"values": images.mean((1, 2, 3)).tolist()})

    with answering(behave) as url:
        output = remote(url, batch_size=1, concurrency=2)(IMAGES, PROMPTS)
    assert output.values.tolist() == pytest.approx(LEVELS) and most[0] == 2


def test_a_token_comes_from_the_environment_and_goes_nowhere_else(monkeypatch, caplog):
    """Mutation: leave it out of the request, or put it into a message."""
    monkeypatch.delenv("SCORER_TOKEN", raising=False)
    with pytest.raises(ValueError, match="SCORER_TOKEN"):
        client(token_env="SCORER_TOKEN")
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")
    seen = []

    def behave(handler, body):
        seen.append(handler.headers["Authorization"])
        reply(handler, {"error": "no"}, 401)

    with answering(behave) as url, caplog.at_level(logging.DEBUG):
        output = remote(url, batch_size=5, token_env="SCORER_TOKEN")(IMAGES, PROMPTS)
    assert seen == ["Bearer s3cret"]
    assert "s3cret" not in caplog.text + str(output.info)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("localhost:8000", "http://"),
        ("ftp://host", "http://"),
        ("http://", "http://"),
        ("http://host/score?x=1", "http://"),
        ("http://user:pass@host", "token_env"),
    ],
)
def test_addresses_are_checked(url, word):
    """Mutation: leave it to the first request of the run; a password would be written to
    config.yaml.
    """
    with pytest.raises(ValueError, match=word):
        check_url(url)
    assert check_url("https://host:1/scores/") == "https://host:1/scores"


@pytest.mark.parametrize(
    "name", ["timeout", "deadline", "retries", "concurrency", "open_after", "max_answer"]
)
def test_settings_are_checked(name):
    """A deadline is at least the time-out, retries may be none. Mutation: drop a check."""
    with pytest.raises(ValueError, match=f"client.{name}=-1 must be a (whole )?number"):
        client(**{name: -1})
    with pytest.raises(
        ValueError, match=r"client.deadline=1.0 must be at least client.timeout=2.0"
    ):
        client(timeout=2.0, deadline=1.0)


def test_nothing_but_json_is_sent():
    """Mutation: pickle, or raw tensors."""
    seen = []

    def behave(handler, body):
        seen.append((handler.path, handler.headers["Content-Type"], json.loads(body)))
        scorer(brightness)(handler, body)

    with answering(behave) as url:
        remote(url, batch_size=5)(IMAGES, PROMPTS)
    (path, kind, data), *others = seen
    assert (path, kind, others) == ("/score", "application/json", [])
    assert (
        data["prompts"][3] == {"text": "prompt 3", "family": "", "metadata": {}}
        and len(data["images"]) == 5
    )
