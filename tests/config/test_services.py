"""Servers that a reward needs are asked before anything is loaded: there, right, and letting us
in.
"""

import socket
import threading
import time

import pytest
import torch
from omegaconf import OmegaConf
from servers import answering, brightness, client, remote, reply, scorer

from flowrl.cli import doctor as doctor_program
from flowrl.errors import UserError
from flowrl.launch.build import build
from flowrl.launch.compose import compose
from flowrl.launch.services import check_services
from flowrl.rewards.judge import Judge, Question
from flowrl.types import Prompt

SOON = "reward.client.start_seconds=0.2"


def refusal(*overrides):
    """What `check_services` says of a configuration, and after how long."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        check_services(compose(["name=test", *overrides]).reward)
    return str(error.value), time.monotonic() - start


@pytest.fixture
def nowhere():
    """The address of a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_a_server_that_is_not_there_is_told_before_weights_load(nowhere, capsys):
    """Within a second, and with a line while it waits. Mutation: leave it to the first call and its
    retries.

    The model's path does not exist, which would be told if it was loaded first.
    """
    start = time.monotonic()
    with pytest.raises(UserError, match="no server there") as error:
        build(
            compose(
                [
                    "name=t",
                    "reward=remote",
                    f"reward.url={nowhere}",
                    SOON,
                    "model.pretrained=./none",
                ]
            )
        )
    assert time.monotonic() - start < 3
    assert f"reward.url={nowhere}" in str(error.value) and "reward.client.start_seconds=60" in str(
        error.value
    )
    assert capsys.readouterr().out.count("waiting up to 0.2 s for the server") == 1


def test_a_server_that_starts_later_is_waited_for():
    """Trainer and server may be started together. Mutation: ask once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = probe.getsockname()[1]
    done = threading.Event()

    def serve():
        time.sleep(0.7)
        with answering(scorer(brightness), port=place):
            done.wait(20)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        overrides = ["name=t", "reward=remote", f"reward.url=http://127.0.0.1:{place}"]
        start = time.monotonic()
        check_services(compose([*overrides, "reward.client.start_seconds=20"]).reward)
        assert 0.6 < time.monotonic() - start < 10
    finally:
        done.set()
        thread.join()


def no_health(handler):
    reply(handler, b"", 404)


@pytest.mark.parametrize(
    ("get", "post", "words"),
    [
        (None, 401, ("HTTP 401", "no token was sent", "reward.client.token_env")),
        (None, 403, ("HTTP 403", "reward.client.token_env")),
        (None, 404, ("/score answers HTTP 404", "reward.url")),
        (no_health, 404, ("/score answers HTTP 404", "reward.url")),
        (
            lambda h: reply(h, b"<html>router</html>"),
            200,
            ("no scoring server does", "<html>", "reward.url"),
        ),
    ],
)
def test_what_is_no_scoring_server_or_lets_nobody_in_is_refused_at_once(get, post, words):
    """Mutation: wait for what will not pass, believe any answer, or ask /health alone, which needs
    no token.
    """
    options = {} if get is None else {"get": get}
    with answering(lambda h, body: reply(h, {"error": "no"}, post), **options) as url:
        text, seconds = refusal(
            "reward=remote", f"reward.url={url}", "reward.client.start_seconds=30"
        )
    assert seconds < 3 and f"reward.url={url}" in text and all(word in text for word in words), text


@pytest.mark.parametrize("status", [422, 400, 500, 503])
def test_a_scoring_server_may_refuse_a_request_without_images_as_it_likes(status):
    """One in another language, perhaps without /health. Mutation: ask for FlowRL's own 422."""
    for get in ({}, {"get": no_health}) if status != 503 else ({},):
        with answering(lambda h, body: reply(h, {"error": "no images"}, status), **get) as url:
            check_services(
                compose(["name=t", "reward=remote", f"reward.url={url}/score", SOON]).reward
            )


def test_each_judge_of_a_mixture_is_asked_for_its_model():
    """Its key is named, and the models that the server has. Mutation: look at the reward's top node
    alone.
    """
    key = "reward.rewards.geneval2.judge"
    with answering(lambda h, body: reply(h, {})) as url:
        text, _ = refusal("reward=geneval2_mixture", f"{key}.url={url}/v1")
        assert (
            "no model 'Qwen/Qwen3-VL-8B-Instruct' but vlm" in text
            and f"look at {key}.model" in text
        )
        check_services(
            compose(
                ["name=t", "reward=geneval2", f"reward.judge.url={url}", "reward.judge.model=vlm"]
            ).reward
        )
    with answering(
        lambda h, body: reply(h, {}), get=lambda h: reply(h, {"error": "key"}, 401)
    ) as url:
        text, _ = refusal("reward=hpsv3", f"reward.judge.url={url}")
        assert "HTTP 401" in text and "look at reward.judge.client.token_env" in text
    with answering(lambda h, body: reply(h, {}), get=no_health) as url:
        text, _ = refusal("reward=unified_reward", f"reward.judge.url={url}")
        assert "no OpenAI-compatible server" in text and "look at reward.judge.url" in text


def test_runs_of_earlier_versions_and_null_do_not_ask(nowhere):
    """Mutation: a key that their folders lack is needed."""
    cfg = compose(
        ["name=t", "reward=remote", f"reward.url={nowhere}", "reward.client.start_seconds=null"]
    )
    check_services(cfg.reward)
    OmegaConf.set_struct(cfg, False)
    del cfg.reward.client["start_seconds"]
    check_services(cfg.reward)


def test_the_doctor_says_so_too(nowhere):
    """Mutation: a table of missing scores after minutes."""
    with pytest.raises(UserError, match="no server there"):
        doctor_program.run(["reward=remote", f"reward.url={nowhere}", SOON], None, 1.0)


@pytest.mark.parametrize(
    "ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"]
)
def test_a_judges_address_may_end_as_servers_print_it(ending):
    """Mutation: ask /v1/v1/chat/completions."""
    paths = []

    def behave(handler, body):
        paths.append(handler.path)
        reply(handler, {"data": [{"data": [1.0]}], "choices": [{"message": {"content": "x"}}]})

    with answering(behave) as url:
        judge = Judge(
            url=f"{url}/mine{ending}",
            model="vlm",
            max_tokens=1,
            top_logprobs=0,
            client=client(retries=0),
        )
        question = [Question(0, "?")]
        assert judge.ask(torch.zeros(1, 3, 4, 4), question)[0].text == "x"
        assert judge.pool(torch.zeros(1, 3, 4, 4), question) == [[1.0]]
    assert paths == ["/mine/v1/chat/completions", "/mine/pooling"]


def test_a_scoring_servers_address_may_be_that_of_its_page():
    """It announces http://host:port/score. Mutation: ask /score/score."""
    with answering(scorer(brightness)) as url:
        assert remote(f"{url}/score/")(torch.ones(1, 3, 4, 4), [Prompt("a")]).values.tolist() == [
            1.0
        ]
