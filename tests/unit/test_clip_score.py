"""CLIP score, PickScore and the aesthetic predictor on transformers' own CLIPModel, small and with
random weights.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from scorers import save_aesthetic, save_clip
from transformers import CLIPModel, CLIPProcessor

from flowrl.rewards.aesthetic import Aesthetic
from flowrl.rewards.clip_score import CLIPScore
from flowrl.rewards.images import to_tensor
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt

TEXTS = ("a red circle", "two blue squares and a green cross", "a red circle", "a cross")
PROMPTS = [Prompt(text) for text in TEXTS]
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for i in range(len(TEXTS))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of 30,000 parameters in the layout of the hub, with the embedded pipeline's
    tokenizer.
    """
    return save_clip(tmp_path_factory.mktemp("clip"))


def score(folder, divisor, **options):
    options = {"dtype": "float32", "batch_size": 3} | options
    return CLIPScore(pretrained=folder, processor=folder, divisor=divisor, **options)


@torch.no_grad()
def by_hand(folder):
    """Unit features and exp(logit_scale), from the class's own forward pass, one pair at a time."""
    model, processor = (
        CLIPModel.from_pretrained(folder).eval(),
        CLIPProcessor.from_pretrained(folder),
    )
    rows = []
    for text, picture in zip(TEXTS, PICTURES, strict=True):
        inputs = processor(
            text=[text],
            images=[picture],
            return_tensors="pt",
            padding="max_length",
            max_length=16,
            truncation=True,
        )
        output = model(**inputs)
        rows.append((output.image_embeds[0], output.text_embeds[0]))
    images, texts = (torch.stack(column) for column in zip(*rows, strict=True))
    return images, texts, model.logit_scale.exp().item()


@pytest.mark.parametrize("divisor", [30.0, 26.0])
def test_the_scaled_cosine(folder, divisor):
    """exp(3) cos / divisor. Mutation: no scale, a divisor of 100, features not of unit length, or
    prompt 0 for all.
    """
    images, texts, scale = by_hand(folder)
    output = RewardModule(reward=score(folder, divisor), max_missing=0.0).score(PICTURES, PROMPTS)
    assert scale == pytest.approx(np.exp(3.0), rel=1e-6)
    expected = scale * (images * texts).sum(-1) / divisor
    torch.testing.assert_close(output.values, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        output.parts["cosine"], (images * texts).sum(-1), rtol=1e-5, atol=1e-5
    )
    assert output.values.std() > 0.01


def test_tensors_and_batches_give_the_same(folder):
    """Mutation: another resize for tensors, or padding to the batch's longest text without its
    mask.
    """
    reward = RewardModule(reward=score(folder, 30.0), max_missing=0.0)
    values = reward.score(PICTURES, PROMPTS).values
    assert torch.equal(reward.score(to_tensor(PICTURES), PROMPTS).values, values)
    alone = torch.cat(
        [reward.score([p], [q]).values for p, q in zip(PICTURES, PROMPTS, strict=True)]
    )
    torch.testing.assert_close(alone, values, rtol=1e-5, atol=1e-6)


def test_options_are_checked(folder):
    """Mutation: drop a check."""
    for name, value in {"divisor": 0.0, "dtype": "int8", "batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"reward.{name}"):
            score(folder, **({"divisor": 30.0} | {name: value}))


def test_the_aesthetic_predictor(folder, tmp_path):
    """The published file's layers in a plain Sequential, on the unit features.

    Mutation: activations between the layers, features not of unit length, or dropout at work.
    """
    mlp, weights = save_aesthetic(tmp_path)
    reward = Aesthetic(
        pretrained=folder,
        processor=folder,
        dtype="float32",
        batch_size=2,
        weights=weights,
    )
    output = RewardModule(reward=reward, max_missing=0.0).score(PICTURES, PROMPTS)
    images, _, _ = by_hand(folder)
    with torch.no_grad():
        torch.testing.assert_close(output.values, mlp.eval()(images)[:, 0], rtol=1e-5, atol=1e-5)


def test_a_predictor_for_another_clip_is_refused(folder, tmp_path):
    """Mutation: load with strict=False."""
    torch.save({"layers.0.weight": torch.zeros(1024, 768)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"reward.weights=.*24 dimensions"):
        Aesthetic(
            pretrained=folder,
            processor=folder,
            dtype="float32",
            batch_size=2,
            weights=str(tmp_path / "other.pth"),
        )
