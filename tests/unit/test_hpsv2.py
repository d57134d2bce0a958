"""HPSv2 on open_clip's own class with its tokenizer, small and with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from scorers import save_hps

from flowrl.rewards.hpsv2 import HPSv2
from flowrl.rewards.images import to_tensor
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt

open_clip = pytest.importorskip("open_clip")
PROMPTS = [Prompt("a red circle"), Prompt("seven swans a-swimming"), Prompt("a red circle")]
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for i in range(3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A registered architecture and a checkpoint as the authors wrap theirs."""
    return save_hps(tmp_path_factory.mktemp("hps"))


def reward(weights, architecture="tiny-hps"):
    return HPSv2(architecture=architecture, weights=weights, dtype="float32", batch_size=2)


@torch.no_grad()
def by_hand(network, picture, text):
    """The cosine of the class's raw features, for a square picture: resized and normalised, nothing
    else.
    """
    pixels = (
        torch.tensor(np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))).permute(
            2, 0, 1
        )
        / 255
    )
    published = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in published)
    image = network.encode_image(((pixels - mean) / std)[None])[0]
    words = network.encode_text(open_clip.get_tokenizer("ViT-H-14")([text]))[0]
    return (image @ words / image.norm() / words.norm()).item()


def test_the_plain_cosine(model):
    """Mutation: times the logit scale, features not of unit length, or the first prompt for all."""
    network, weights = model
    output = RewardModule(reward=reward(weights), max_missing=0.0).score(PICTURES, PROMPTS)
    expected = [
        by_hand(network, picture, prompt.text)
        for picture, prompt in zip(PICTURES, PROMPTS, strict=True)
    ]
    assert output.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert output.values.std() > 1e-3


def test_a_wide_picture_is_padded_not_cropped(model):
    """Red borders left and right of a crop count. Mutation: resize_mode=shortest."""
    _, weights = model
    wide = Image.new("RGB", (120, 40), "white")
    marked = wide.copy()
    marked.paste("red", (0, 0, 20, 40))
    values = (
        RewardModule(reward=reward(weights), max_missing=0.0)
        .score([wide, marked], PROMPTS[:2])
        .values
    )
    same = (
        RewardModule(reward=reward(weights), max_missing=0.0)
        .score([wide, wide], [PROMPTS[1]] * 2)
        .values
    )
    assert abs(values[1] - same[1]) > 1e-4


def test_tensors_give_the_same_number(model):
    """Mutation: another resize for tensors."""
    module = RewardModule(reward=reward(model[1]), max_missing=0.0)
    assert torch.equal(
        module.score(PICTURES, PROMPTS).values, module.score(to_tensor(PICTURES), PROMPTS).values
    )


def test_wrong_names_are_refused(model, tmp_path):
    """Mutation: load with strict=False, or let open_clip's own error through."""
    with pytest.raises(ValueError, match=r"reward.architecture='ViT-H-15'.*ViT-H-14"):
        reward(model[1], "ViT-H-15")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"reward.weights=.*reward.architecture=tiny-hps"):
        reward(str(tmp_path / "other.pt"))
