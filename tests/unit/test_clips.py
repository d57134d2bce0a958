"""Clips are scored by their frames, or whole."""

import math

import pytest
import torch
from PIL import Image

from flowrl.errors import UserError
from flowrl.images.clips import evenly, save_moving
from flowrl.images.pictures import FRAME_MILLISECONDS, read_frames
from flowrl.rewards.clips import Frames
from flowrl.rewards.mixture import Mixture
from flowrl.rewards.routed import Routed
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt, RewardOutput

PROMPTS = [Prompt("a"), Prompt("b")]


def clips(*brightness):
    """Grey clips (B F 3 2 2) of these brightnesses, a list for each."""
    return torch.tensor(brightness)[:, :, None, None, None].repeat(1, 1, 3, 2, 2)


TWO = clips([0.1, 0.2, 0.3, 0.8, 0.9], [0.5, 0.4, 0.3, 0.2, 0.1])


class Bright:
    """Scores the first pixel of images, notes every call, and fails on darkness."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts):
        self.calls.append((tuple(images.shape), "".join(prompt.text for prompt in prompts)))
        if (images == 0).any():
            raise RuntimeError("too dark")
        values = images[:, 0, 0, 0]
        return RewardOutput(
            values,
            torch.ones(len(values), dtype=torch.bool),
            {"double": 2 * values},
            [{"seen": round(float(value), 3)} for value in values],
        )


class Change:
    """Scores clips by how far their last frame is from the first."""

    whole_clips = True

    def __init__(self):
        self.shapes = []

    def __call__(self, images, prompts):
        self.shapes.append(tuple(images.shape))
        values = (images[:, -1] - images[:, 0]).mean((1, 2, 3))
        return RewardOutput(values, torch.ones(len(values), dtype=torch.bool))


def module(reward, count=None, reduce="mean", max_missing=0.0):
    return RewardModule(
        reward=reward, max_missing=max_missing, frames=Frames(count=count, reduce=reduce)
    )


@pytest.mark.parametrize(
    ("total", "count", "numbers"),
    [
        (5, 3, [0, 2, 4]),
        (9, 4, [0, 3, 5, 8]),
        (81, 4, [0, 27, 53, 80]),
        (4, 3, [0, 2, 3]),
        (5, 1, [2]),
        (3, 4, [0, 1, 2]),
        (3, None, [0, 1, 2]),
    ],
)
def test_frames_are_spread_from_the_first_to_the_last(total, count, numbers):
    """1.5 becomes 2. Mutation: leave the last frame out, or cut halves off."""
    assert evenly(total, count) == numbers


def test_a_clips_score_is_the_mean_of_its_frames_scores():
    """Of frames 0, 2 and 4: (0.1 + 0.3 + 0.9) / 3 and (0.5 + 0.3 + 0.1) / 3; all in one call, with
    the prompts again for each time.

    Mutation: take all frames, the frames of one clip after another, or the prompts in that order.
    """
    reward = Bright()
    got = module(reward, count=3).score(TWO, PROMPTS)
    assert got.values.tolist() == pytest.approx([1.3 / 3, 0.3])
    assert got.terms[:, 0].tolist() == got.values.tolist()
    assert got.parts["double"].tolist() == pytest.approx([2.6 / 3, 0.6])
    assert reward.calls == [((6, 3, 2, 2), "ababab")]
    assert got.info[1] == {"frames": {"0": {"seen": 0.5}, "2": {"seen": 0.3}, "4": {"seen": 0.1}}}


@pytest.mark.parametrize(
    ("reduce", "values", "num_shown"),
    [("min", [0.1, 0.1], 10), ("first", [0.1, 0.5], 2), ("last", [0.9, 0.1], 2)],
)
def test_frames_are_reduced_as_asked(reduce, values, num_shown):
    """Mutation: show all frames where one counts, or take the best."""
    reward = Bright()
    got = module(reward, reduce=reduce).score(TWO, PROMPTS)
    assert got.values.tolist() == pytest.approx(values)
    assert reward.calls[0][0][0] == num_shown


def test_a_clip_is_missing_where_a_frame_is():
    """A scorer that fails on one frame costs that clip alone, with the frame's number; a clip that
    is not finite is not shown.

    Mutation: call a clip valid for any of its frames, or name the frame by its place among those
    that are shown.
    """
    reward = Bright()
    three = clips([0.5, 0.5, 0.0], [0.4, 0.4, 0.4], [0.4, math.nan, 0.4])
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    got = module(reward, count=2, max_missing=1.0).score(three, prompts)
    assert got.is_valid.tolist() == [False, True, False]
    assert got.values.tolist() == pytest.approx([0, 0.4, 0])
    assert got.info[0]["missing"] == "frame 2: RuntimeError: too dark"
    assert got.info[2]["missing"] == "image is not finite"
    assert not any("c" in texts for _, texts in reward.calls)


def test_a_scorer_may_ask_for_whole_clips():
    """And is given an image as a clip of one frame. Mutation: show it frames."""
    reward = Change()
    assert module(reward, count=2).score(TWO, PROMPTS).values.tolist() == pytest.approx([0.8, -0.4])
    images = TWO[:, 0]
    assert module(reward).score(images, PROMPTS).values.tolist() == [0, 0]
    pictures = [Image.new("RGB", (2, 2))] * 2
    assert module(reward).score(pictures, PROMPTS).values.tolist() == [0, 0]
    assert reward.shapes == [(2, 5, 3, 2, 2), (2, 1, 3, 2, 2), (2, 1, 3, 2, 2)]


def test_each_reward_of_a_mixture_sees_what_it_asks_for():
    """min (0.1, 0.1) + 10 x change (0.8, -0.4), which a route hands on for the first prompt alone.

    Mutation: show a mixture frames, or a route.
    """
    change = Change()
    mixture = Mixture(
        rewards={
            "bright": Bright(),
            "change": change,
            "some": Routed(reward=change, key="family", values=["x"]),
        },
        weights={"bright": 1, "change": 10, "some": 0},
    )
    prompts = [Prompt("a", family="x"), Prompt("b")]
    got = module(mixture, reduce="min").score(TWO, prompts)
    assert mixture.whole_clips
    assert got.values.tolist() == pytest.approx([8.1, -3.9])
    assert got.terms.tolist() == [
        pytest.approx([0.1, 0.8]),
        pytest.approx([0.1, -0.4]),
    ]
    assert got.parts["bright_double"].tolist() == pytest.approx([0.2, 0.2])
    assert got.parts["some"][0].item() == pytest.approx(0.8) and got.parts["some"][1].isnan()
    assert change.shapes == [(2, 5, 3, 2, 2), (1, 5, 3, 2, 2)]


class Rank:
    """Scores an image by how many of its prompt's images are darker."""

    whole_groups = True

    def __init__(self):
        self.sizes = []

    def __call__(self, images, prompts):
        self.sizes.append(len(images))
        brightness = images.mean((1, 2, 3))
        ranks = (brightness[:, None] > brightness[None]).sum(1).float()
        return RewardOutput(ranks, torch.ones(len(ranks), dtype=torch.bool))


def test_images_of_a_prompt_are_compared_at_one_time():
    """Frames 0: 0.1 < 0.5; frames 4: 0.9 > 0.1. So each clip is the brighter one once of two, and
    the third and fourth clip always in their order.

    Mutation: compare frames of all times, or all clips of a call.
    """
    reward = Rank()
    group = torch.cat([TWO, clips([0.3] * 5, [0.6] * 5)])
    got = module(reward, count=2).score(group, [*PROMPTS, *PROMPTS], 2)
    assert got.values.tolist() == [0.5, 0.5, 0, 1]
    assert reward.sizes == [2] * 4


def test_a_wrapper_with_terms_keeps_them_and_their_sum():
    """A mixture of one's own that is shown frames: terms (1, 3) and (2, 1) of two frames, of which
    each is reduced, and then summed with weights 1 and 10; the second does not apply to the other
    prompt.

    Mutation: reduce the sums, or sum what does not apply.
    """

    def own(images, prompts):
        terms = torch.tensor([[1.0, 3.0], [5.0, 5.0], [2.0, 1.0], [4.0, 5.0]])
        applies = torch.tensor([[True, True], [True, False]] * 2)
        is_valid = torch.ones(4, dtype=torch.bool)
        return RewardOutput(
            terms[:, 0], is_valid, terms=terms, weights=(1.0, 10.0), applies=applies
        )

    two_frames = TWO[:, :2]
    got = module(own, reduce="min").score(two_frames, PROMPTS)
    assert got.values.tolist() == [1 + 10 * 1, 4]
    assert got.terms[0].tolist() == [1, 1] and got.terms[1, 1].isnan()


def test_clips_need_to_be_told_how_they_are_scored():
    """Images do not. Mutation: show all frames."""
    bare = RewardModule(reward=Bright(), max_missing=0.0)
    assert bare.score(TWO[:, 0], PROMPTS).values.tolist() == pytest.approx([0.1, 0.5])
    with pytest.raises(UserError, match=r"^frames: say how clips are scored"):
        bare.score(TWO, PROMPTS)
    with pytest.raises(UserError, match=r"frames\.count=0 must be"):
        Frames(count=0, reduce="mean")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_a_moving_picture_has_the_frames_of_its_clip(kind, tmp_path):
    """Equal ones, too, which a file has once. Mutation: write the first one, or read what the file
    has.
    """
    levels = [0, 0, 255, 120]
    frames = [Image.new("RGB", (16, 8), (level,) * 3) for level in levels]
    path = tmp_path / "clip"
    save_moving(frames, path, kind)
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
    read = read_frames(path)
    assert [frame.size for frame in read] == [(16, 8)] * 4
    assert [frame.getpixel((3, 3))[0] for frame in read] == pytest.approx(levels, abs=3)
    assert FRAME_MILLISECONDS == 125


def test_a_picture_is_one_frame(tmp_path):
    """And what is no picture is named. Mutation: count by a duration that it does not have."""
    path = tmp_path / "picture.png"
    Image.new("L", (4, 4), 7).save(path)
    (frame,) = read_frames(path)
    assert frame.mode == "RGB" and frame.getpixel((0, 0)) == (7, 7, 7)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"picture\.png: cannot be read as a picture"):
        read_frames(path)
