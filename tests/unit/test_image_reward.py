"""ImageReward in transformers' BLIP, against numbers of the authors' own code on the same small
random checkpoint.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.rewards.image_reward import ImageReward
from flowrl.rewards.images import to_tensor
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "circle",
    "two",
    "blue",
    "squares",
    "and",
)
TEXTS = ("a red circle", "two blue squares and a red circle", "a circle")
GOLDEN = (15.716236114501953, 25.92626190185547, 42.32658004760742)
"""From image-reward 1.5's `ImageReward.score` (its ViT and BERT classes) on `checkpoint()` and
`pictures()`.
"""


def shapes(width=128, depth=2, text_width=128, layers=2):
    """Names and shapes of the authors' checkpoint, in small."""
    names = {"cls_token": (1, 1, width), "pos_embed": (1, 17, width)}
    names |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        block = {
            "norm1": (width,),
            "norm2": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
        }
        block |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        names |= both(f"blocks.{i}", block)
    names |= both("", {"norm": (width,)})
    found = {f"blip.visual_encoder.{name}": shape for name, shape in names.items()}
    wide = 2 * text_width
    text = both("embeddings", {"LayerNorm": (text_width,)})
    text["embeddings.word_embeddings.weight"] = (16, text_width)
    text["embeddings.position_embeddings.weight"] = (40, text_width)
    for i in range(layers):
        block = {
            "intermediate.dense": (wide, text_width),
            "output.dense": (text_width, wide),
            "output.LayerNorm": (text_width,),
        }
        for name, source in (("attention", text_width), ("crossattention", width)):
            block |= {f"{name}.self.query": (text_width, text_width)}
            block |= {f"{name}.self.{part}": (text_width, source) for part in ("key", "value")}
            block |= {
                f"{name}.output.dense": (text_width, text_width),
                f"{name}.output.LayerNorm": (text_width,),
            }
        text |= both(f"encoder.layer.{i}", block)
    found |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    sizes = (text_width, 1024, 128, 64, 16, 1)
    head = {str(n): (b, a) for n, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False)}
    return found | both("mlp.layers", head)


def both(prefix, shapes):
    """Weight and bias of each layer."""
    found = {}
    for name, shape in shapes.items():
        path = f"{prefix}.{name}" if prefix else name
        found |= {f"{path}.weight": shape, f"{path}.bias": shape[:1]}
    return found


def checkpoint():
    """Random weights, each from a seed of its own."""
    state = {}
    for seed, (name, shape) in enumerate(sorted(shapes().items())):
        values = np.random.default_rng(seed).normal(size=shape) * (
            0.3 if len(shape) == 1 else 3 / np.sqrt(shape[-1])
        )
        if "norm" in name.lower() and name.endswith("weight"):
            values = 1 + values
        state[name] = torch.tensor(values, dtype=torch.float32)
    return state


def pictures():
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8))
        for i in range(3)
    ]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.save(checkpoint(), folder / "ImageReward.pt")
    own = ImageReward(
        weights=str(folder / "ImageReward.pt"), tokenizer=str(folder), dtype="float32", batch_size=2
    )
    return RewardModule(reward=own, max_missing=0.0)


def test_the_authors_numbers(reward):
    """Mutation: four heads for two, epsilon 1e-5 for 1e-6, a causal mask, or the mean not
    subtracted.
    """
    values = reward.score(pictures(), [Prompt(text) for text in TEXTS]).values
    assert values.tolist() == pytest.approx(GOLDEN, rel=1e-5)


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


def test_one_nan_pixel_costs_one_score(reward):
    """Mutation: show the scorer all images, which loses all of them."""
    module = reward
    images = torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    whole = module.score(images, [Prompt(text) for text in (*TEXTS, TEXTS[0])] * 2)
    images[3, 0, 0, 0] = torch.nan
    got = module.score(images, [Prompt(text) for text in (*TEXTS, TEXTS[0])] * 2)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert got.is_valid.tolist() == [True] * 3 + [False] + [True] * 4 and whole.is_valid.all()
    torch.testing.assert_close(got.values[others], whole.values[others], rtol=1e-4, atol=1e-4)
    assert got.info[3]["missing"] == "image is not finite"
