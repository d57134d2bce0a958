"""Where W&B's runs go, for every kind of key that its library takes, with a stand-in for its
server.
"""

import logging
import os
import socket
import subprocess
import sys
import time

import pytest
import wandb
from wandb_server import KEY, TOKEN, Server

from flowrl.callbacks import trackers
from flowrl.callbacks.trackers import Destination, destination, start, wandb_logger


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home directory, an environment without W&B's variables, and its library as in a new
    process.
    """
    for name in list(os.environ):
        if name.startswith("WANDB_") or name in (
            "NETRC",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        ):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield home
    wandb.teardown()


@pytest.fixture
def server():
    with Server() as server:
        yield server


def netrc(path, host, key=KEY):
    path.write_text(f"machine {host}\n  login user\n  password {key}\n")


def login(*arguments):
    """What `wandb login` of the installed version writes."""
    command = [sys.executable, "-m", "wandb", "login", "--relogin", "--no-verify", *arguments, KEY]
    subprocess.run(command, check=True, capture_output=True)


def in_environment(monkeypatch, home, server):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)


def in_home(monkeypatch, home, server):
    netrc(home / ".netrc", server.host)
    monkeypatch.setenv("WANDB_BASE_URL", f"{server.url}/")


def in_another_netrc(monkeypatch, home, server):
    netrc(home / "keys", server.host)
    monkeypatch.setenv("NETRC", "~/keys")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)


def by_login(monkeypatch, home, server):
    login("--host", server.url)


def in_settings(monkeypatch, home, server):
    (home / "config").mkdir()
    (home / "config" / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "config"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)


def as_token(monkeypatch, home, server):
    (home / "token").write_text(TOKEN)
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(home / "token"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)


@pytest.mark.parametrize(
    "keep", [in_environment, in_home, in_another_netrc, by_login, in_settings, as_token]
)
def test_every_kind_of_key_is_seen(keep, monkeypatch, home, server):
    """Mutation: look for WANDB_API_KEY and for api.wandb.ai in ~/.netrc alone."""
    keep(monkeypatch, home, server)
    assert destination() == Destination("online")
    assert server.seen == ["Viewer"]


def test_the_key_of_wandb_login_is_seen(monkeypatch, home):
    """The installed version stores it under a host of its own. Mutation: ask for the host of an
    earlier version.
    """
    monkeypatch.setattr(trackers, "is_reachable", lambda url: False)
    login("--cloud")
    assert destination() == Destination(
        "offline", f"{wandb.setup().settings.base_url} cannot be reached", True
    )
    assert wandb.setup().settings.base_url.removeprefix("https://") in (home / ".netrc").read_text()


def test_no_key_is_no_fault(monkeypatch, home, server):
    """A key of another host is none, and nobody is asked. Mutation: take any key, or prompt for
    one.
    """
    netrc(home / ".netrc", "api.wandb.ai.example")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    assert destination() == Destination(
        "offline", f"no key for {server.url} (`wandb login` stores one)"
    )
    assert server.seen == []


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("offline", Destination("offline", "asked for by its mode offline")),
        ("dryrun", Destination("offline", "asked for by its mode dryrun")),
        ("disabled", Destination("disabled")),
    ],
)
def test_the_mode_is_respected(mode, expected, monkeypatch, home, server):
    """Mutation: go online since there is a key."""
    in_environment(monkeypatch, home, server)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert destination() == expected
    assert server.seen == []


def test_the_mode_of_the_configuration_comes_first(monkeypatch, home, server):
    """Mutation: ask the environment alone, or keep a run offline that was to be online."""
    in_environment(monkeypatch, home, server)
    assert destination("offline") == Destination("offline", "asked for by its mode offline")
    assert destination("disabled") == Destination("disabled")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert destination("online") == Destination("online")
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode=online: no key for .*mode=offline"):
        destination("online")


def test_a_refused_key_is_told(monkeypatch, home, server):
    """Mutation: believe a key that is there, and fail when the run begins."""
    in_environment(monkeypatch, home, server)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    place = destination()
    assert (place.mode, place.is_fault) == ("offline", True) and server.host in place.reason
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    assert "API key must have 40+ characters" in destination().reason


@pytest.mark.parametrize("is_listening", [False, True])
def test_a_key_without_a_network_is_told_in_seconds(
    is_listening, monkeypatch, home, tmp_path, caplog, capsys
):
    """A port where nobody listens, and one that takes the connection and never answers.

    Mutation: leave it to W&B, which tries for a minute and a half and raises; or say nothing.
    """
    monkeypatch.setattr(trackers.is_reachable, "__defaults__", (0.5,))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if is_listening:
            silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        begin = time.monotonic()
        with caplog.at_level(logging.WARNING):
            logger = make(tmp_path)
        assert time.monotonic() - begin < 10
    assert caplog.messages == [f"W&B: {url} cannot be reached; the run is kept offline"]
    assert not (tmp_path / "wandb_id").exists()
    start(logger, tmp_path)
    logger.experiment.finish()
    (segment,) = (tmp_path / "wandb").glob("offline-run-*")
    place = segment.relative_to(tmp_path)  # the working directory
    assert capsys.readouterr().out == f"W&B: offline; send it with:\n  wandb sync {place}\n"
    assert (tmp_path / "wandb_id").read_text() == segment.name.rsplit("-", 1)[1]


def make(folder, **options):
    return wandb_logger(
        project="flowrl",
        name="n",
        group=None,
        job_type="train",
        tags=None,
        folder=str(folder),
        **options,
    )


def test_what_the_configuration_says_reaches_wandb(home, tmp_path):
    """Mutation: drop the entity or the notes, or hand W&B a mode that it was not told."""
    settings = make(tmp_path, entity="team", notes="why", mode="offline")._wandb_init
    assert (settings["entity"], settings["notes"], settings["mode"]) == ("team", "why", "offline")
    assert make(tmp_path, mode="disabled")._wandb_init["mode"] == "disabled"


def test_an_online_run_says_where_it_goes(monkeypatch, home, server, tmp_path, capsys):
    """Mutation: print the host alone, or keep the run offline."""
    in_environment(monkeypatch, home, server)
    logger = make(tmp_path)
    start(logger, tmp_path)
    logger.experiment.finish()
    assert capsys.readouterr().out == f"W&B: {server.url}/me/flowrl/runs/the-id\n"
    assert "UpsertBucket" in server.seen


def test_a_disabled_run_is_silent(monkeypatch, home, tmp_path, capsys):
    """Mutation: announce a folder that is not written."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start(make(tmp_path), tmp_path)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "wandb").exists()


def test_refused_settings_are_the_users_mistake(monkeypatch, home):
    """Mutation: let the run begin, which W&B then ends with a traceback."""
    monkeypatch.setenv("WANDB_BASE_URL", "nowhere")
    with pytest.raises(ValueError, match=r"W&B refuses its settings: .*base_url.*logger=none"):
        destination()
