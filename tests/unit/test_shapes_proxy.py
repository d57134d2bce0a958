"""The learned reward of the shapes world: shipped weights that are mostly right, and a script that
makes them.
"""

import random
from pathlib import Path

import pytest
import torch
from shapes_pipeline import draw_scenes
from train_proxy import ARCHITECTURE, accuracy, scenes, targets, train

from flowrl.rewards.shapes_proxy import END, ShapesProxy, build, tokenize
from flowrl.shapes.grammar import FAMILIES
from flowrl.types import Prompt

STUDY = Path(__file__).parents[2] / "experiments" / "multi_reward"


@pytest.fixture(scope="module")
def proxy():
    return ShapesProxy(pretrained="embedded:", divisor=2.0).requires_grad_(False)


def hits(proxy):
    """Share of unseen scenes whose own caption beats that of the next one."""
    captions, images = draw_scenes(96, random.Random("unseen"))
    texts = [caption.text for caption in captions]
    right, wrong = (
        proxy(images / 2 + 0.5, [Prompt(text) for text in own]).values
        for own in (texts, texts[1:] + texts[:1])
    )
    differs = torch.tensor([a != b for a, b in zip(texts, texts[1:] + texts[:1], strict=True)])
    return float((right > wrong)[differs].float().mean())


def test_words_are_tokens():
    """Mutation: let the end token be lower than a word's, where open_clip would not read."""
    assert tokenize(["a red cat", "two blue circles"], 6).tolist()[0][2:] == [END, 0, 0, 0]
    rows = tokenize([" ".join(["red"] * 9)], 4)
    assert rows.shape == (1, 4) and rows[0, -1] == END == rows.max()


def test_it_tells_right_captions_from_wrong_ones(proxy):
    """Mutation: score against the wrong row."""
    assert hits(proxy) > 0.9


def test_the_weak_one_is_worse_yet_no_noise():
    """Mutation: let `embedded:weak` load the shipped one, or a fresh one."""
    weak = ShapesProxy(pretrained="embedded:weak", divisor=2.0).requires_grad_(False)
    assert 0.55 < hits(weak) < 0.85


def test_the_study_quotes_how_often_both_find_the_right_caption(proxy):
    """Of 16, in whole percent. Mutation: ship other weights without saying so."""
    weak = ShapesProxy(pretrained="embedded:weak", divisor=2.0)
    text = " ".join((STUDY / "README.md").read_text().split())
    assert f"one of 16 captions for {accuracy(proxy.model):.0%}".replace("%", " %") in text
    assert f"saw 64 and finds it for {accuracy(weak.model):.0%}".replace("%", " %") in text


def test_the_value_is_the_scaled_cosine(proxy):
    """Mutation: forget the divisor or the learned scale."""
    output = proxy(torch.rand(2, 3, 32, 32), [Prompt("a red circle"), Prompt("two crosses")])
    scale = float(proxy.model.logit_scale.exp())
    assert output.values.tolist() == pytest.approx((output.parts["cosine"] * scale / 2).tolist())
    assert output.parts["cosine"].abs().max() <= 1 and output.is_valid.all()


def test_weights_that_are_not_there_are_named(tmp_path):
    """Mutation: a traceback of open_clip."""
    with pytest.raises(ValueError, match=r"reward.pretrained=.*train_proxy"):
        ShapesProxy(pretrained=str(tmp_path), divisor=1.0)
    with pytest.raises(ValueError, match="divisor"):
        ShapesProxy(pretrained="embedded:", divisor=0.0)


def test_training_repeats_and_learns():
    """Two steps twice give the same weights, other than random ones. Mutation: draw scenes
    unseeded.
    """
    first, second = (train(2, 7, num_scenes=32).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    torch.manual_seed(7)
    start = build(ARCHITECTURE).state_dict()
    assert not torch.equal(first["visual.proj"], start["visual.proj"])
    tokens = torch.tensor([[1, 2], [3, 2], [1, 2]])
    assert targets(tokens).tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    assert scenes(4, "x")[0].min() >= -1 and len(FAMILIES) == 7
