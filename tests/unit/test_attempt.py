"""One sample's fault costs no other sample its score: for faults of scorers, and for images that
are not finite.
"""

import pytest
import torch
from servers import answering, client, remote, reply

from flowrl.rewards.attempt import attempt
from flowrl.rewards.brisque import BRISQUE
from flowrl.rewards.geneval2 import GenEval2
from flowrl.rewards.hpsv3 import HPSv3
from flowrl.rewards.jpeg import JPEG
from flowrl.rewards.judge import Judge
from flowrl.rewards.mixture import Mixture
from flowrl.rewards.routed import Routed
from flowrl.rewards.shapes import ShapesReward
from flowrl.rewards.shapes_proxy import ShapesProxy
from flowrl.rewards.unified_reward import UnifiedReward
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt, RewardOutput

NUMBERS = torch.arange(16.0).view(16, 1, 1, 1).repeat(1, 3, 2, 2)
WORDS = [Prompt(f"{i}") for i in range(16)]


class Picky:
    """Each image's mean; raises where it is shown a prompt of `bad`. Counts its calls."""

    def __init__(self, *bad, weights=None):
        self.bad, self.num_calls = {str(i) for i in bad}, 0
        if weights is not None:
            self.weights = weights

    def __call__(self, images, prompts):
        self.num_calls += 1
        if found := [prompt.text for prompt in prompts if prompt.text in self.bad]:
            raise KeyError(f"prompt {found[0]}")
        values = images.mean((1, 2, 3))
        return RewardOutput(values, torch.ones(len(prompts)).bool(), {"twice": 2 * values})


@pytest.mark.parametrize("bad", [(5,), (0, 15), (4, 5, 6, 7), (3, 4)])
def test_samples_at_fault_are_found(bad):
    """Alone, at both ends, and as a group that shares its prompt. Mutation: the whole half is lost,
    or the order is.
    """
    reward = Picky(*bad)
    got = attempt(reward, NUMBERS, WORDS)
    assert got.is_valid.tolist() == [i not in bad for i in range(16)]
    assert got.values.tolist() == [0 if i in bad else i for i in range(16)]
    assert got.parts["twice"][14] == (28 if 14 not in bad else 0)
    assert [entry.get("missing") for entry in got.info] == [
        f"KeyError: 'prompt {i}'" if i in bad else None for i in range(16)
    ]


def test_a_scorer_that_is_broken_is_not_asked_for_ever(caplog):
    """Sixteen samples, halves, quarters: 1 + 2 + 4 calls. Mutation: one call a sample; or say
    nothing.
    """
    reward = Picky(*range(16))
    got = attempt(reward, NUMBERS, WORDS, "reward judge")
    assert (
        reward.num_calls == 7 and not got.is_valid.any() and "prompt 0" in got.info[15]["missing"]
    )
    assert caplog.text.count("reward judge failed on 16 images") == 1


def test_a_single_sample_is_asked_for_once():
    """Mutation: repeat a call that has no halves, for ever."""
    reward = Picky(0)
    assert not attempt(reward, NUMBERS[:1], WORDS[:1]).is_valid.any() and reward.num_calls == 1


def test_a_reward_of_a_mixture_that_raises_costs_one_sample_and_is_named():
    """Mutation: the mixture as a whole raises, and its good reward is asked again for every
    piece.
    """
    rewards = {"good": Picky(), "picky": Picky(3), "watch": Picky(8)}
    mixture = Mixture(rewards=rewards, weights={"good": 1.0, "picky": 1.0, "watch": 0.0})
    got = RewardModule(reward=mixture, max_missing=1.0).score(NUMBERS, WORDS)
    assert got.is_valid.tolist() == [i != 3 for i in range(16)]
    assert got.values.tolist() == [0 if i == 3 else 2 * i for i in range(16)]
    assert got.info[3] == {"missing": "picky: KeyError: 'prompt 3'"}
    assert got.parts["watch"].isnan().tolist() == [i == 8 for i in range(16)]
    assert rewards["good"].num_calls == 1


def test_a_route_that_raises_costs_one_sample():
    """Mutation: all prompts that the route is for."""
    prompts = [Prompt(f"{i}", "even" if i % 2 == 0 else "odd") for i in range(16)]
    got = RewardModule(
        reward=Routed(reward=Picky(4), key="family", values=["even"]), max_missing=1.0
    ).score(NUMBERS, prompts)
    assert got.is_valid.tolist() == [i != 4 for i in range(16)]
    assert got.has_value.tolist() == [i % 2 == 0 and i != 4 for i in range(16)]
    assert got.values[[0, 2, 6, 14]].tolist() == [0, 2, 6, 14]


@pytest.fixture(scope="module")
def judge():
    """A judge that answers every question of a chat and of a pool alike."""
    tops = [{"token": "Yes", "logprob": -0.5, "bytes": None}]
    content = {"content": [{"token": "Yes", "logprob": -0.5, "top_logprobs": tops}]}
    chat = {"choices": [{"message": {"content": "Final Score: 3"}, "logprobs": content}]}
    pool = {"data": [{"data": [3.0, 0.1]}]}
    with answering(lambda h, body: reply(h, pool if h.path == "/pooling" else chat)) as url:
        yield Judge(url=url, model="vlm", max_tokens=1, top_logprobs=20, client=client(retries=0))


QUESTIONS = {"vqa_list": [["Is it red?", "Yes"]]}


def scorers(judge):
    """Each scorer that runs without weights of the hub."""
    shapes, jpeg = ShapesReward(score="soft"), JPEG(quality=95, scale=1.0)
    yield "shapes", shapes
    yield "jpeg", jpeg
    yield "brisque", BRISQUE()
    yield "shapes_proxy", ShapesProxy(pretrained="embedded:", divisor=30.0)
    yield "geneval2", GenEval2(mean="geometric", judge=judge)
    yield "unified_reward", UnifiedReward(judge=judge)
    yield "hpsv3", HPSv3(scale=15.0, judge=judge)
    yield "mixture", Mixture(rewards={"a": shapes, "b": jpeg}, weights={"a": 1.0, "b": 2.0})
    yield "routed", Routed(reward=jpeg, key="family", values=["f"])


NAMES = [
    "shapes",
    "jpeg",
    "brisque",
    "shapes_proxy",
    "geneval2",
    "unified_reward",
    "hpsv3",
    "mixture",
    "routed",
]


@pytest.mark.parametrize("name", NAMES)
def test_one_nan_pixel_leaves_seven_of_eight(judge, name):
    """And the seven scores are those that they have without the eighth image.

    Mutation: let the scorer see NaN, which loses all eight, or gives the eighth a score.
    """
    if name == "shapes_proxy":
        pytest.importorskip("open_clip")
    module = RewardModule(reward=dict(scorers(judge))[name], max_missing=1.0)
    x = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = [
        Prompt(f"{number} red circles", "f", QUESTIONS)
        for number in ("two", "three", "four", "two") * 2
    ]
    whole = module.score(x, prompts)
    assert whole.is_valid.all()
    x[3, 0, 0, 0] = float("nan")
    got = module.score(x, prompts)
    assert got.is_valid.tolist() == [True] * 3 + [False] + [True] * 4
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(got.values[others], whole.values[others], rtol=1e-5, atol=1e-6)
    assert got.info[3]["missing"] == "image is not finite" and got.values[3] == 0


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"vqa_list": None},
        {"vqa_list": "Is it red?"},
        {"vqa_list": [["Is it red?"]]},
        {"vqa_list": [3]},
    ],
)
def test_questions_of_another_form_cost_their_own_prompt(judge, metadata):
    """Mutation: take a string for a list of pairs, or raise for the whole call."""
    prompts = [Prompt("good", "", QUESTIONS | {"skills": None}), Prompt("odd one", "", metadata)]
    got = GenEval2(mean="geometric", judge=judge)(torch.zeros(2, 3, 4, 4), prompts)
    assert got.is_valid.tolist() == [True, False]
    assert "'odd one'" in got.info[1]["missing"] and "vqa_list" in got.info[1]["missing"]


def test_what_cannot_be_sent_costs_its_own_request():
    """Metadata that are no JSON. Mutation: let json's error take the other requests along."""
    prompts = [Prompt("a"), Prompt("b", "", {"when": object()}), Prompt("c")]
    with answering(lambda h, body: reply(h, {"values": [0.5]})) as url:
        got = remote(url, batch_size=1)(torch.zeros(3, 3, 4, 4), prompts)
    assert (
        got.is_valid.tolist() == [True, False, True]
        and "cannot be sent as JSON" in got.info[1]["missing"]
    )


def test_an_empty_row_of_a_reward_head_costs_its_own_sample():
    """Mutation: take the first number of no numbers, for the whole call."""
    rows = iter([[[0.5, 0.1]], [[]], [[1.5, 0.1]]])
    with answering(lambda h, body: reply(h, {"data": [{"data": next(rows)}]})) as url:
        own = client(retries=0, concurrency=1)
        judge = Judge(url=url, model="vlm", max_tokens=1, top_logprobs=0, client=own)
        got = HPSv3(scale=1.0, judge=judge)(torch.zeros(3, 3, 4, 4), [Prompt("a")] * 3)
    assert got.is_valid.tolist() == [True, False, True] and got.values.tolist() == [0.5, 0, 1.5]
