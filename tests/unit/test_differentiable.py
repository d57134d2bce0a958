"""Scorers with a gradient: what they give for floats beside what they give for pictures of 8 bits,
and what is refused.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from scorers import save_aesthetic, save_clip, save_hps, save_image_reward

from flowrl.rewards.aesthetic import Aesthetic
from flowrl.rewards.clip_score import CLIPScore
from flowrl.rewards.clips import Frames
from flowrl.rewards.differentiable import fit_inside, resize, score_with_graph
from flowrl.rewards.hpsv2 import HPSv2
from flowrl.rewards.image_reward import PIXEL_STD, ImageReward
from flowrl.rewards.images import to_tensor
from flowrl.rewards.jpeg import JPEG
from flowrl.rewards.mixture import Mixture
from flowrl.rewards.shapes_proxy import ShapesProxy
from flowrl.types import Prompt, RewardOutput

PROMPTS = [Prompt("a red circle"), Prompt("two blue squares"), Prompt("a red circle")]
SCORERS = ("clip_score", "aesthetic", "hpsv2", "image_reward", "shapes_proxy")


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """Each scorer small and with random weights, the proxy as it is shipped."""
    folder = tmp_path_factory.mktemp("scorers")
    clip = save_clip(folder / "clip")
    network = {"pretrained": clip, "processor": clip, "dtype": "float32", "batch_size": 2}
    weights = save_aesthetic(folder)[1]
    hps = save_hps(folder)[1]
    blip = save_image_reward(folder)
    made = {
        "clip_score": CLIPScore(**network, divisor=30.0),
        "aesthetic": Aesthetic(**network, weights=weights),
        "hpsv2": HPSv2(architecture="tiny-hps", weights=hps, dtype="float32", batch_size=2),
        "image_reward": ImageReward(**blip, dtype="float32", batch_size=2),
        "shapes_proxy": ShapesProxy(pretrained="embedded:", divisor=30.0),
    }
    return {name: scorer.requires_grad_(False).eval() for name, scorer in made.items()}


def pictures(height, width):
    """Smooth pictures of 8 bits as floats, with the range's ends in them."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    images = [
        Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in small
    ]
    return to_tensor(images)


def seen(scorer, ask):
    """The pixels that reach a scorer's network in a call, as levels of 8 bits, and the values."""
    networks = {"CLIPScore": "model.vision_model", "Aesthetic": "model.vision_model"}
    networks |= {"HPSv2": "model.visual", "ImageReward": "vision", "ShapesProxy": "model.visual"}
    batches = []

    def note(_, args, kwargs):
        batches.append(args[0] if args else kwargs["pixel_values"])

    network = scorer.get_submodule(networks[type(scorer).__name__])
    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        values = ask()
    hook.remove()
    std = 0.5 if isinstance(scorer, ShapesProxy) else torch.tensor(PIXEL_STD).view(3, 1, 1)
    return torch.cat(batches) * std * 255, values


@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 96), (60, 90), (90, 60)])
@pytest.mark.parametrize("name", SCORERS)
def test_the_network_sees_what_it_sees_of_pictures(scorers, name, height, width):
    """Up to a resized picture's rounding to 8 bits, twice in PIL, which rounds between rows and
    columns; where nothing is resized there is none, and the values are equal.

    Mutation: crop where a scorer pads, resize without antialiasing, or leave the normalisation out.
    """
    if name == "shapes_proxy" and (height, width) != (32, 32):
        pytest.skip("it sees 32x32 alone")
    images, scorer = pictures(height, width), scorers[name]
    expected, values = seen(scorer, lambda: scorer(images, PROMPTS).values)
    levels, others = seen(scorer, lambda: scorer.score_with_graph(images, PROMPTS))
    gap = levels - expected
    rms = gap.square().mean().sqrt()
    print(f"{name} {height}x{width}: rms {rms:.2g} levels, most {gap.abs().max():.2g}")
    print(f"  values {values.tolist()} and {others.tolist()}")
    assert others.shape == (3,) and others.dtype == torch.float32
    assert rms < 0.6 and gap.abs().max() < 2.5
    if expected.shape[-1] == height == width:
        assert gap.abs().max() < 1e-3
        torch.testing.assert_close(others, values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCORERS)
def test_the_gradient_is_that_of_the_score(scorers, name):
    """Along its own direction, by differences; each image's value is its own. Mutation: detach the
    images or the features, or a gradient of another row.
    """
    scorer = scorers[name]
    images = pictures(32, 32).clamp(0.1, 0.9).requires_grad_()
    values = scorer.score_with_graph(images, PROMPTS)
    (gradient,) = torch.autograd.grad(values[1], images)
    assert not gradient[[0, 2]].any() and gradient[1].any()
    slope = gradient.square().sum().item()
    length = 1e-3 * abs(values[1].item()) / slope
    with torch.no_grad():
        up, down = (
            scorer.score_with_graph(images + sign * length * gradient, PROMPTS)[1].double()
            for sign in (1, -1)
        )
    assert (up - down).item() == pytest.approx(2 * length * slope, rel=5e-2)


def test_images_are_resized_and_padded_as_open_clip_does_it():
    """A wide picture of one colour: all of it, between equal bars of black. Mutation: pad one side
    alone, or crop.
    """
    square = fit_inside(torch.full((1, 3, 10, 40), 0.5), 20)
    assert square.shape == (1, 3, 20, 20)
    assert not square[:, :, :7].any() and not square[:, :, 12:].any()
    torch.testing.assert_close(square[:, :, 7:12], torch.full((1, 3, 5, 20), 0.5))
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    enlarged = resize(edge, [32, 32])
    assert enlarged.min() == 0 and enlarged.max() == 1


class Brightness:
    """An image's mean, which is differentiable."""

    def __call__(self, images, prompts):
        values = images.mean((1, 2, 3))
        return RewardOutput(values, torch.ones(len(prompts), dtype=torch.bool))

    def score_with_graph(self, images, prompts):
        return images.mean((1, 2, 3))


def test_a_mixture_is_the_weighted_sum_and_monitors_need_no_gradient():
    """2 x .25 - .25. Mutation: leave the weights out, or ask the reward of weight 0."""
    rewards = {"a": Brightness(), "b": Brightness(), "c": JPEG(quality=95, scale=1.0)}
    mixture = Mixture(rewards=rewards, weights={"a": 2.0, "b": -1.0, "c": 0.0})
    images = torch.full((2, 3, 4, 4), 0.25)
    assert mixture.score_with_graph(images, PROMPTS[:2]).tolist() == [0.25, 0.25]
    mixture = Mixture(rewards=rewards, weights={"a": 2.0, "b": -1.0, "c": 1.0})
    with pytest.raises(ValueError, match=r"JPEG \(c\) has no gradient.*pickscore"):
        mixture.score_with_graph(images, PROMPTS[:2])


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 0.5), ("min", 0.25), ("last", 0.75)])
def test_of_clips_the_frames_that_are_shown_are_scored(reduce, expected):
    """Three of five frames, of brightness 1/4, 1/2 and 3/4. Mutation: mix frames of different
    clips, or average where the least counts.
    """
    clips = torch.zeros(2, 5, 3, 4, 4)
    for number, level in ((0, 0.25), (2, 0.5), (4, 0.75)):
        clips[:, number] = level
    clips[1] /= 2
    frames = Frames(count=3, reduce=reduce)
    values = score_with_graph(Brightness(), clips.requires_grad_(), PROMPTS[:2], frames)
    assert values.tolist() == pytest.approx([expected, expected / 2])
    (gradient,) = torch.autograd.grad(values.sum(), clips)
    assert not gradient[:, 1].any() and gradient[:, 4].any() == (reduce != "min")


def test_what_has_no_gradient_is_refused():
    """In one line that names those that have one. Mutation: call it, and train on nothing."""
    with pytest.raises(ValueError, match=r"JPEG has no gradient.*aesthetic, clip_score"):
        score_with_graph(JPEG(quality=95, scale=1.0), torch.zeros(1, 3, 4, 4), PROMPTS[:1], None)
    with pytest.raises(ValueError, match="frames: say how"):
        score_with_graph(Brightness(), torch.zeros(1, 2, 3, 4, 4), PROMPTS[:1], None)
