"""CLIP score, PickScore and the aesthetic predictor on transformers' own CLIPModel, small and with
random weights.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from flowrl.models.loading import resolve
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
    path = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(resolve("embedded:pipeline") + "/tokenizer")
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=small | text, vision_config=small | vision, projection_dim=24
        )
        config.logit_scale_init_value = 3.0
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            if parameter.dim():
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return str(path)


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
    sizes = (24, 1024, 128, 64, 16, 1)
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    mlp = nn.Sequential(
        linear[0], dropouts[0], linear[1], dropouts[1], linear[2], dropouts[2], linear[3], linear[4]
    )
    torch.save(
        {f"layers.{name}": value for name, value in mlp.state_dict().items()}, tmp_path / "mlp.pth"
    )
    reward = Aesthetic(
        pretrained=folder,
        processor=folder,
        dtype="float32",
        batch_size=2,
        weights=str(tmp_path / "mlp.pth"),
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


def test_one_nan_pixel_costs_one_score(folder):
    """Mutation: show the scorer all images, which loses all of them."""
    module = RewardModule(reward=score(folder, 30.0), max_missing=1.0)
    images = torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    whole = module.score(images, PROMPTS * 2)
    images[3, 0, 0, 0] = torch.nan
    got = module.score(images, PROMPTS * 2)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert got.is_valid.tolist() == [True] * 3 + [False] + [True] * 4 and whole.is_valid.all()
    torch.testing.assert_close(got.values[others], whole.values[others], rtol=1e-4, atol=1e-4)
    assert got.info[3]["missing"] == "image is not finite"
