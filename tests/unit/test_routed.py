import pytest
import torch
from PIL import Image

from flowrl.rewards.mixture import Mixture
from flowrl.rewards.routed import Routed
from flowrl.types import Prompt, RewardOutput

PROMPTS = [
    Prompt("a", "ocr"),
    Prompt("b", "count"),
    Prompt("c", metadata={"set": "signs"}),
    Prompt("d", "ocr"),
]
IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2) / 4


class Brightness:
    """The mean of each image, of those that it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts):
        self.seen.append([prompt.text for prompt in prompts])
        is_tensor = isinstance(images, torch.Tensor)
        values = (
            torch.stack([image.mean() for image in images])
            if is_tensor
            else torch.zeros(len(prompts))
        )
        return RewardOutput(
            values,
            values < 0.7,
            {"twice": 2 * values},
            [{"text": prompt.text} for prompt in prompts],
        )


def test_only_its_prompts_reach_the_reward():
    """Mutation: score all and mask, or put the values back in another order."""
    reward = Brightness()
    output = Routed(reward=reward, key="family", values=["ocr"])(IMAGES, PROMPTS)
    assert reward.seen == [["a", "d"]]
    assert output.applies[:, 0].tolist() == [True, False, False, True]
    assert output.is_valid.tolist() == [
        True,
        True,
        True,
        False,
    ]  # the last one is too bright for it
    assert output.values[[0, 3]].tolist() == [0, 0.75] and output.values[[1, 2]].isnan().all()
    assert output.parts["twice"][3] == 1.5 and output.parts["twice"][1].isnan()
    assert [each.get("text") for each in output.info] == ["a", None, None, "d"]


def test_routing_by_metadata_and_of_pictures():
    """Mutation: look at the family only, or index a list with a list."""
    reward = Brightness()
    pictures = [Image.new("RGB", (2, 2))] * 4
    Routed(reward=reward, key="set", values=["signs", "menus"])(pictures, PROMPTS)
    assert reward.seen == [["c"]]


@pytest.mark.parametrize(
    ("value", "values", "expected"),
    [
        (3, [3, 4], True),
        (3, ["3"], True),
        ("3", [3], True),
        (5, [3, 4], False),
        (True, [True], True),
        (True, ["true"], True),
        (False, [True], False),
        (1, [True], False),
        (None, ["None"], False),
    ],
)
def test_values_are_compared_as_text(value, values, expected):
    """Booleans as JSON's words, null never. Mutation: as text on one side only, or True as 1."""
    output = Routed(reward=Brightness(), key="k", values=values)(
        IMAGES[:1], [Prompt("a", metadata={"k": value})]
    )
    assert output.applies.item() is expected


def test_no_prompt_of_its_own_is_no_call():
    """Mutation: call a scorer with nothing."""
    output = Routed(reward=Brightness(), key="family", values=["colour"])(IMAGES, PROMPTS)
    assert not output.applies.any() and output.is_valid.all()


def test_a_mixture_of_routes_sums_what_applies():
    """Mutation: zero for the reward that does not apply."""
    rewards = {
        "ocr": Routed(reward=Brightness(), key="family", values=["ocr"]),
        "all": Brightness(),
    }
    output = Mixture(rewards=rewards, weights={"ocr": 10.0, "all": 1.0})(IMAGES, PROMPTS)
    assert output.values.tolist()[:3] == [0, 0.25, 0.5]
    assert output.is_valid.tolist() == [True, True, True, False]


@pytest.mark.parametrize("values", ["ocr", []])
def test_values_are_a_list(values):
    """Mutation: take a string as its letters."""
    with pytest.raises(ValueError, match=r"reward\.values"):
        Routed(reward=Brightness(), key="family", values=values)


@pytest.mark.parametrize(
    "result", [ConnectionError("no route to host"), RewardOutput(torch.ones(1), torch.ones(1) > 0)]
)
def test_a_failing_reward_costs_its_own_prompts_alone(result, caplog):
    """It raises, or gives too few values: its two prompts are missing and say why, the others do
    not apply.

    Mutation: let the failure through, which marks all four, or score the failed ones 0.
    """

    def failing(images, prompts):
        if isinstance(result, Exception):
            raise result
        return result

    output = Routed(reward=failing, key="family", values=["ocr"])(IMAGES, PROMPTS)
    assert output.applies[:, 0].tolist() == [True, False, False, True]
    assert output.is_valid.tolist() == [False, True, True, False]
    assert output.values[[1, 2]].isnan().all() and not output.has_value.any()
    assert ["Error: " in info.get("missing", "") for info in output.info] == [
        True,
        False,
        False,
        True,
    ]
    assert "reward for family in ['ocr'] failed on 2 images" in caplog.text


def test_a_failing_route_leaves_the_rest_of_a_mixture():
    """Mutation: raise, so that the mixture loses the prompts that only its other reward judges."""

    def failing(images, prompts):
        raise RuntimeError("out of memory")

    rewards = {"ocr": Routed(reward=failing, key="family", values=["ocr"]), "all": Brightness()}
    output = Mixture(rewards=rewards, weights={"ocr": 10.0, "all": 1.0})(IMAGES, PROMPTS)
    assert output.is_valid.tolist() == [False, True, True, False]
    assert output.values.tolist()[1:3] == [0.25, 0.5]
    assert output.info[0] == {"missing": "ocr: RuntimeError: out of memory"}
