"""ImageReward in transformers' BLIP, against numbers of the authors' own code on the same small
random checkpoint.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from scorers import save_image_reward

from flowrl.rewards.image_reward import ImageReward
from flowrl.rewards.images import to_tensor
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt

TEXTS = ("a red circle", "two blue squares and a red circle", "a circle")
GOLDEN = (15.716236114501953, 25.92626190185547, 42.32658004760742)
"""From image-reward 1.5's `ImageReward.score` (its ViT and BERT classes) on
`scorers.image_reward_checkpoint()` and `pictures()`.
"""


def pictures():
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8))
        for i in range(3)
    ]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    files = save_image_reward(tmp_path_factory.mktemp("image_reward"))
    own = ImageReward(**files, dtype="float32", batch_size=2)
    return RewardModule(reward=own, max_missing=0.0)


def test_the_authors_numbers(reward):
    """Random weights make rounding large: with and without oneDNN the scores differ by 1.6e-4 of
    their size on one processor, and by 5e-5 between two. Mutation: four heads for two, epsilon
    1e-3 for 1e-6, a causal mask, or the mean not subtracted.
    """
    values = reward.score(pictures(), [Prompt(text) for text in TEXTS]).values
    assert values.tolist() == pytest.approx(GOLDEN, rel=5e-4)


def test_tensors_and_batches_give_the_same(reward):
    """Mutation: resize tensors without antialiasing, or pad to the longest text without its
    mask.
    """
    prompts = [Prompt(text) for text in TEXTS]
    values = reward.score(pictures(), prompts).values
    assert torch.equal(reward.score(to_tensor(pictures()), prompts).values, values)
    alone = torch.cat(
        [reward.score([p], [q]).values for p, q in zip(pictures(), prompts, strict=True)]
    )
    torch.testing.assert_close(alone, values, rtol=1e-5, atol=1e-5)


def test_another_checkpoint_is_refused(tmp_path):
    """Mutation: load with strict=False."""
    torch.save({"blip.visual_encoder.cls_token": torch.zeros(1, 1, 64)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"reward.weights=.*not a checkpoint of ImageReward"):
        ImageReward(
            weights=str(tmp_path / "other.pt"),
            tokenizer=str(tmp_path),
            dtype="float32",
            batch_size=2,
        )
