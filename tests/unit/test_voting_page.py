"""The voting page's server: what it shows, takes and refuses."""

import os
import re
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from ballots import BLUE, GREEN, GREY, RED, fill, plain

from flowrl.cli import vote as vote_program
from flowrl.errors import UserError
from flowrl.serving import voting
from flowrl.serving.connections import Connection
from flowrl.serving.voting import LEASE, VotingPages, build_app
from flowrl.votes.album import write_pairs
from flowrl.votes.files import is_seen, picture_path, read_votes
from flowrl.votes.rounds import write_status

TOKEN = "s3cret-token"
COLOURS = [RED, GREEN, BLUE, GREY, (1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@contextmanager
def serving(folder, clock=time.monotonic):
    """The application in a thread; gives a client that has the token."""
    config = uvicorn.Config(
        build_app(VotingPages(folder, TOKEN, clock)),
        port=0,
        http=Connection,
        ws="none",
        log_level="error",
        timeout_keep_alive=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False
    ) as client:
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture
def pairs(tmp_path):
    """Four pairs: two drawn before training, two in iteration 3."""
    old = [(plain(COLOURS[2 * i]), plain(COLOURS[2 * i + 1]), None) for i in range(2)]
    new = [(plain(COLOURS[2 * i]), plain(COLOURS[2 * i + 1]), None) for i in range(2, 4)]
    return fill(tmp_path, old) + fill(tmp_path, new, iteration=3)


def state(client, tab="a"):
    return client.get("/state", params={"tab": tab}).json()


def shown(answer):
    return [pair["pair"] for pair in answer["pairs"]]


def say(client, pair, choice="left", tab="a"):
    return client.post("/vote", json={"pair": pair.key, "choice": choice, "tab": tab})


def test_the_newest_pairs_come_first_and_a_vote_brings_the_next(tmp_path, pairs):
    """With all that the page shows. Mutation: oldest first, or forget to write."""
    with serving(tmp_path) as client:
        answer = state(client)
        assert shown(answer) == [pairs[2].key, pairs[3].key]
        first = answer["pairs"][0]
        assert (first["prompt"], first["iteration"]) == ("prompt 0", 3)
        assert (answer["num_votes"], answer["num_open"], answer["has_vote"]) == (0, 4, False)
        picture = client.get(f"/pictures/{first['left']}")
        assert picture.content == picture_path(tmp_path, first["left"]).read_bytes()
        answer = say(client, pairs[2], "right").json()
        assert shown(answer) == [pairs[3].key, pairs[0].key]
        assert (answer["num_votes"], answer["num_open"], answer["has_vote"]) == (1, 3, True)
    [vote] = read_votes(tmp_path).votes
    assert (vote.key, vote.choice, vote.tab, vote.iteration) == (pairs[2].key, "right", "a", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", vote.time)


def test_nothing_of_the_run_is_told_without_the_token(tmp_path, pairs):
    """Neither pictures nor pairs, and no vote is taken; the page itself holds nothing. Mutation:
    leave one address open.
    """
    body = {"pair": pairs[0].key, "choice": "left", "tab": "a"}
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}]
    with serving(tmp_path) as client:
        del client.headers["Authorization"]
        for headers in wrong:
            answers = [
                client.get("/state?tab=a", headers=headers),
                client.get(f"/pictures/{pairs[0].left}", headers=headers),
                client.post("/vote", json=body, headers=headers),
                client.post("/undo", json={"tab": "a"}, headers=headers),
            ]
            assert {answer.status_code for answer in answers} == {401}
            assert all(list(answer.json()) == ["error"] for answer in answers)
        page = client.get("/")
    assert page.status_code == 200 and "prompt 0" not in page.text and TOKEN not in page.text
    assert not (tmp_path / "votes.jsonl").exists()


def test_the_page_asks_nobody_else_and_runs_its_own_script_alone(tmp_path, pairs):
    """Mutation: an address of another server, no policy, or one nonce for all."""
    with serving(tmp_path) as client:
        first, second = client.get("/"), client.get("/")
    assert not re.search(r"https?://|//[a-z]|@import|\burl\(", first.text.replace("// ", ""))
    nonces = []
    for page in (first, second):
        policy = page.headers["content-security-policy"]
        nonces += re.findall(r"script-src 'nonce-([\w-]+)'", policy)
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert page.text.count(f'nonce="{nonces[-1]}"') == 2 and "NONCE" not in page.text
        assert page.headers["referrer-policy"] == "no-referrer"
    assert len(set(nonces)) == 2
    assert "innerHTML" not in first.text  # prompts are texts of others


def test_what_is_refused(tmp_path, pairs):
    """Each with its status and a reason, and nothing written. Mutation: let any of them through."""
    picture_path(tmp_path, pairs[1].right).unlink()
    good = {"pair": pairs[0].key, "choice": "left", "tab": "a"}
    cases = [
        (422, good | {"choice": "both"}),
        (422, good | {"choice": "undone"}),
        (422, good | {"choice": None}),
        (422, good | {"tab": "a b"}),
        (422, good | {"tab": "x" * 65}),
        (404, good | {"pair": "0" * 16}),
        (404, good | {"pair": pairs[1].key}),
        (413, good | {"more": "x" * 5000}),
        (422, [good]),
    ]
    with serving(tmp_path) as client:
        for status, body in cases:
            answer = client.post("/vote", json=body)
            assert answer.status_code == status, body
            assert answer.json()["error"]
        for content in (b"", b"{", b"\xff", b"[" * 3000):
            assert client.post("/vote", content=content).status_code == 422
        assert client.post("/undo", json={"tab": "a"}).status_code == 409
        assert client.get("/state").status_code == 422
        for name in ("x", "..%2Fvotes.jsonl", "0" * 64, pairs[1].right):
            assert client.get(f"/pictures/{name}").status_code == 404
        assert client.get("/vote").status_code == 405
        assert not (tmp_path / "votes.jsonl").exists()
        # A pair without its pictures is not shown either.
        assert state(client)["num_open"] == 3
        assert say(client, pairs[0]).status_code == 200


def test_a_slow_body_is_given_up(tmp_path, pairs, monkeypatch):
    """Mutation: wait for ever."""
    monkeypatch.setattr(voting, "BODY_SECONDS", 0.2)

    def slowly():
        yield b"{"
        time.sleep(0.6)
        yield b"}"

    with serving(tmp_path) as client:
        assert client.post("/vote", content=slowly()).status_code == 408


def test_a_second_vote_on_a_pair_is_refused(tmp_path, pairs):
    """From whichever tab. Mutation: write it all the same."""
    with serving(tmp_path) as client:
        assert say(client, pairs[0], "left").status_code == 200
        for tab in ("a", "b"):
            again = say(client, pairs[0], "right", tab)
            assert again.status_code == 409 and "already" in again.json()["error"]
    assert [vote.choice for vote in read_votes(tmp_path).votes] == ["left"]


def test_tabs_are_shown_different_pairs(tmp_path, pairs):
    """Until a tab has been silent for long. Mutation: no leases, or leases that never end."""
    clock = Clock()
    with serving(tmp_path, clock) as client:
        assert shown(state(client, "a")) == [pairs[2].key, pairs[3].key]
        assert shown(state(client, "b")) == [pairs[0].key, pairs[1].key]
        assert shown(state(client, "c")) == []
        # A tab keeps its pairs when it asks again.
        assert shown(state(client, "a")) == [pairs[2].key, pairs[3].key]
        clock.now = LEASE + 1
        assert shown(state(client, "c")) == [pairs[2].key, pairs[3].key]


def test_what_a_tab_looks_at_is_marked_as_seen(tmp_path, pairs):
    """So that training keeps it. Mutation: mark nothing, or all that is open."""
    for path in (tmp_path / "pictures").iterdir():
        os.utime(path, (0, 0))
    with serving(tmp_path) as client:
        state(client)
    assert [is_seen(tmp_path, pair) for pair in pairs] == [False, False, True, True]


def test_votes_without_their_pictures_are_not_counted(tmp_path, pairs):
    """As training does not. Mutation: count the lines."""
    with serving(tmp_path) as client:
        say(client, pairs[0])
        assert say(client, pairs[1]).json()["num_votes"] == 2
        picture_path(tmp_path, pairs[0].right).unlink()
        assert state(client)["num_votes"] == 1


def test_each_tab_takes_back_its_own_last_vote(tmp_path, pairs):
    """Also after a server has begun anew, and the pair comes first then. Mutation: take back the
    last vote of all, or the first.
    """
    with serving(tmp_path) as client:
        say(client, pairs[0], "left", "a")
        say(client, pairs[1], "right", "a")
        say(client, pairs[2], "equal", "b")
    with serving(tmp_path) as client:
        answer = client.post("/undo", json={"tab": "a"}).json()
        assert shown(answer)[0] == pairs[1].key and answer["num_votes"] == 2
        assert [vote.key for vote in read_votes(tmp_path).votes] == [pairs[0].key, pairs[2].key]
        assert say(client, pairs[1], "left", "a").status_code == 200
        client.post("/undo", json={"tab": "a"})
        answer = client.post("/undo", json={"tab": "a"}).json()
        assert shown(answer)[0] == pairs[0].key and not answer["has_vote"]
        assert client.post("/undo", json={"tab": "a"}).status_code == 409
    assert [vote.choice for vote in read_votes(tmp_path).votes] == ["equal"]
    assert read_votes(tmp_path).num_lines == 7  # nothing is ever erased


def test_the_page_is_told_what_training_does(tmp_path, pairs):
    """Damaged words are none. Mutation: fail on them."""
    with serving(tmp_path) as client:
        assert state(client)["training"] is None
        write_status(tmp_path, {"needed": 16, "is_over": False})
        assert state(client)["training"]["needed"] == 16
        (tmp_path / "status.json").write_text("{")
        assert state(client)["training"] is None


def test_which_folder_is_meant(tmp_path, pairs):
    """A run's, or the votes' own. Mutation: take any folder."""
    run = tmp_path / "run"
    (run / "votes").mkdir(parents=True)
    assert vote_program.folder_of(run) == run / "votes"
    assert vote_program.folder_of(tmp_path) == tmp_path
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="no folder of a run"):
        vote_program.folder_of(other)
    (other / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="reward=votes"):
        vote_program.folder_of(other)


def test_a_token_of_ones_own_must_fit_into_an_address(monkeypatch):
    """Mutation: take an empty one."""
    tokens = {vote_program.read_token(None) for _ in range(2)}
    assert len(tokens) == 2 and min(map(len, tokens)) >= 32
    monkeypatch.setenv("VOTING_TOKEN", "abc-DEF_123")
    assert vote_program.read_token("VOTING_TOKEN") == "abc-DEF_123"
    for value in ("", "short", "with a space", "per%cent1"):
        monkeypatch.setenv("VOTING_TOKEN", value)
        with pytest.raises(UserError, match="VOTING_TOKEN"):
            vote_program.read_token("VOTING_TOKEN")


def test_prompts_with_markup_stay_text(tmp_path):
    """As JSON, which no browser takes for a page. Mutation: another type, or no nosniff."""
    write_pairs(tmp_path, [("<script>alert(1)</script>", plain(RED), plain(BLUE))], 1)
    with serving(tmp_path) as client:
        answer = client.get("/state", params={"tab": "a"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["pairs"][0]["prompt"] == "<script>alert(1)</script>"
