"""A server does not start with limits, a scorer or a port that could not work."""

import pytest
import torch
import uvicorn
from servers import brightness
from serving_app import LIMITS

from flowrl.errors import UserError
from flowrl.rewards.outputs import all_valid
from flowrl.serving.app import Limits
from flowrl.serving.listening import bind
from flowrl.serving.server import serve


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
