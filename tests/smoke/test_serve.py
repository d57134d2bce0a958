"""The server's own process: faults of its scorer, signals, and training runs that lose it."""

import csv
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from runs import SHORT, start, train
from servers import ROOT, Process, answering, brightness, remote, scorer

from flowrl.rewards.shapes import ShapesReward
from flowrl.types import Prompt

IMAGES = torch.linspace(0, 1, 4).view(4, 1, 1, 1).expand(4, 3, 8, 8)
MISBEHAVING = ("reward._target_=servers.Misbehaving", "~reward.score", "+reward.patience=1.5")


@pytest.fixture(scope="module")
def server():
    process = Process(
        *MISBEHAVING, "token_env=SCORER_TOKEN", "max_wait=0", env={"SCORER_TOKEN": "s3cret"}
    )
    yield process
    process.process.kill()
    process.process.communicate()


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("SCORER_TOKEN", "s3cret")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("raise", "RuntimeError: out of memory"),
        ("nan", "no number"),
        ("short", "2 images, but values of shape"),
        ("slow", "no answer within"),
        ("fine", None),
    ],
)
def test_a_scorer_that_misbehaves_behind_the_real_server(server, token, word, reason):
    """The first request of two has the fault. Mutation: answer 0, or take the server down."""
    reward = remote(server.url, token_env="SCORER_TOKEN", timeout=1.0, retries=0, concurrency=1)
    output = reward(IMAGES, [Prompt(word), Prompt("a"), Prompt("b"), Prompt("c")])
    if word == "slow":
        time.sleep(
            1.0
        )  # the scorer is busy with the request that was given up, and so the second waited too
        assert not output.is_valid[:2].any()
    else:
        # Where the scorer raises, the request's other sample is scored alone.
        assert output.is_valid.tolist() == [reason is None, word in ("fine", "raise")] + [True] * 2
        assert output.values[2:].tolist() == pytest.approx(
            brightness(IMAGES[2:], "bc").values.tolist(), abs=2e-3
        )
    if reason:
        assert reason in output.info[0]["missing"]
    assert httpx.get(f"{server.url}/health", trust_env=False).json()["status"] == "ok"


def test_a_wrong_token_and_a_large_body_are_refused_by_the_process(server, token, monkeypatch):
    """Mutation: take any token, or read any body."""
    monkeypatch.setenv("OTHER", "wrong")
    output = remote(server.url, token_env="OTHER", retries=0)(IMAGES, [Prompt("a")] * 4)
    assert not output.is_valid.any() and "HTTP 401" in output.info[0]["missing"]
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"Host: h\r\nAuthorization: Bearer s3cret\r\nContent-Length: {1 << 40}"
        connection.sendall(f"POST /score HTTP/1.1\r\n{head}\r\n\r\n".encode())
        connection.settimeout(5)
        assert b" 413 " in connection.recv(100)
    assert remote(server.url, token_env="SCORER_TOKEN")(IMAGES, [Prompt("a")] * 4).is_valid.all()


def test_shutdown_finishes_what_is_under_way(server, token):
    """The last thing that this server does. Mutation: drop the requests at SIGTERM, or lose the
    scorer's tracebacks.
    """
    outputs, reward = [], remote(server.url, batch_size=4, token_env="SCORER_TOKEN")
    # The tests before may have asked another process's server.
    assert not reward(IMAGES[:1], [Prompt("raise")]).is_valid.any()
    asking = threading.Thread(target=lambda: outputs.append(reward(IMAGES, [Prompt("slow")] * 4)))
    asking.start()
    time.sleep(0.5)
    begin = time.monotonic()
    status, err = server.stop()
    asking.join()
    assert outputs[0].is_valid.all() and 0.5 < time.monotonic() - begin < 8
    assert status in (0, -signal.SIGTERM) and "RuntimeError: out of memory" in err


def rows(run):
    return list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))


REMOTE = ("reward=remote", "num_threads=1", "checkpoint.every=100", "reward.client.backoff=0.2")


def wait_for(path, process):
    deadline = time.time() + 120
    while not path.exists():
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_outlives_its_server_being_killed_and_restarted(tmp_path):
    """SIGKILL in mid-run, a new process on the same port: the run goes on where it waited, and
    nothing is missing.

    Mutation: no retries, or a circuit that never closes.
    """
    server = Process("reward=shapes")
    run = tmp_path / "run"
    process = start(
        *SHORT,
        *REMOTE,
        "num_iterations=30",
        "reward.client.retries=30",
        f"reward.url={server.url}",
        f"run_dir={run}",
        cwd=tmp_path,
    )
    wait_for(run / "metrics.csv", process)
    server.stop(signal.SIGKILL)
    time.sleep(1)
    again = Process("reward=shapes", port=server.port)
    _, err = process.communicate(timeout=200)
    again.stop()
    assert process.returncode == 0, err
    assert [row["iteration"] for row in rows(run)] == [str(i + 1) for i in range(30)]
    assert {float(row["reward/missing"]) for row in rows(run)} == {0.0}
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_run_that_loses_its_server_stops_with_a_checkpoint_and_can_be_continued(tmp_path):
    """One line that says why and how to go on; resumed with a server, it gives the numbers of an
    unbroken run, bitwise.

    Mutation: no checkpoint, a traceback, or a hang.
    """
    server = Process("reward=shapes")
    settings = (*SHORT, *REMOTE, "num_iterations=12", "reward.client.retries=1")
    whole = train(
        *settings, f"reward.url={server.url}", f"run_dir={tmp_path / 'whole'}", cwd=tmp_path
    )
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "broken"
    process = start(*settings, f"reward.url={server.url}", f"run_dir={run}", cwd=tmp_path)
    wait_for(run / "metrics.csv", process)
    server.stop(signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    last = err.strip().splitlines()[-1]
    assert process.returncode == 1
    assert (
        last.startswith("error: 100% of the rewards are missing") and f"{server.url}/score" in last
    )
    assert f"train.py resume={run}" in last
    (kept,) = (run / "checkpoints").iterdir()
    assert int(kept.name) == len(rows(run)) < 12 and f"after iteration {int(kept.name)}" in last
    again = Process("reward=shapes", port=server.port)
    resumed = train(f"resume={run}", cwd=tmp_path)
    again.stop()
    assert resumed.returncode == 0, resumed.stderr
    plain = [
        [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(folder)]
        for folder in (run, tmp_path / "whole")
    ]
    assert plain[0] == plain[1]


@pytest.mark.slow
def test_an_interrupt_ends_a_run_that_waits_for_scores(tmp_path):
    """The server hangs for a minute. The first Ctrl-C lets the iteration go on, the second one does
    not wait.

    Mutation: score in a thread that is joined at exit, or take every Ctrl-C for the first.
    """
    asked = []

    def behave(handler, body):
        asked.append(1)
        if len(asked) > 2:  # the first evaluation's sets
            time.sleep(60)
        scorer(ShapesReward(score="soft"))(handler, body)

    with answering(behave) as url:
        remote = ("reward=remote", "reward.batch_size=1000", "reward.client.start_seconds=null")
        run = (*SHORT, *remote, f"reward.url={url}", f"run_dir={tmp_path / 'run'}")
        process = start(*run, cwd=tmp_path)
        deadline = time.time() + 100
        while len(asked) < 3:
            assert process.poll() is None and time.time() < deadline, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - begin < 10


@pytest.mark.slow
def test_memory_and_answers_under_trouble():
    """Bombs take nothing, eight bodies of 100 MB no more than 256 MiB together, and a good client
    is always answered.

    Mutation: decode before counting, or bound each body alone.
    """
    script = [
        sys.executable,
        str(ROOT / "scripts" / "load_reward_server.py"),
        "bombs",
        "idle",
        "bodies",
    ]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    bombs, idle, bodies = (
        [cell.strip() for cell in row.split("|")] for row in done.stdout.splitlines()[2:]
    )
    assert bombs[4].startswith("8 x 413") and int(bombs[3]) < int(bombs[2]) + 50
    assert int(bodies[3]) < int(bodies[2]) + 350 and "503" in bodies[4]
    for cells in (bombs, idle, bodies):
        assert cells[5].startswith("20 x 200")
