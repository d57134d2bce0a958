"""What each reward of conf/reward keeps, whatever it scores: an option added there is tested too.

Weights are small random ones, and judges and servers are threads that answer by brightness.
"""

import base64
import io
import itertools
import json
import math
from functools import cache, partial

import numpy as np
import pytest
import torch
from ballots import fill
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from runs import CONF, ROOT, composed
from scorers import (
    save_aesthetic,
    save_clip,
    save_hps,
    save_image_reward,
    save_mask2former,
    save_owlv2,
)
from servers import answering, brightness, reply, scorer

from flowrl.cli import doctor
from flowrl.rewards.images import to_tensor
from flowrl.rewards.protocol import Reward, check_output
from flowrl.rewards.specimens import pairs, sign
from flowrl.training.reward import NOT_FINITE, RewardModule
from flowrl.types import PictureFile, Prompt

OPTIONS = sorted(path.stem for path in (CONF / "reward").glob("*.yaml"))
EXTRAS = {"OCR": "rapidocr", "HPSv2": "open_clip"}
"""Packages without which a class is not tested."""
RANDOM = ("CLIPScore", "Aesthetic", "HPSv2", "ImageReward", "GenEval")
"""Classes whose random weights order nothing."""
UNBOUNDED = ("ImageReward",)
"""Classes whose range follows from their weights alone."""
UNORDERED = {"ShapesReward": ("score", "clean")}
"""Classes of which one setting does not look at the prompt."""
SIDE = 256
SIDES = {"ShapesProxy": 32}
"""Classes that take pictures of their world's size alone."""
EDITED = PictureFile(str(ROOT / "docs" / "report.png"), "of the docs")
METADATA = {
    "target": "EXIT",
    "vqa_list": [["Is it red?", "Yes"]],
    "tag": "color_attr",
    # What the small detectors of random weights find in some of the pictures.
    "include": [
        {"class": "tv", "count": 1, "color": "red"},
        {"class": "toaster", "count": 1},
        {"class": "fire hydrant", "count": 1, "color": "blue"},
        {"class": "car", "count": 2},
    ],
}
PROMPT = Prompt("a red circle", "colour", METADATA, EDITED)
PROMPTS = [PROMPT, PROMPT, Prompt("a blue square", "colour", PROMPT.metadata, EDITED), PROMPT]


def draw_pictures():
    """Four pictures that any reward can score, and tell apart."""
    of_kind = {pair.kind: pair for pair in reversed(pairs())}
    size = (SIDE, SIDE)
    scene = of_kind["shapes"].good.resize(size, Image.Resampling.NEAREST)
    textured = of_kind["sharpness"].good
    written = sign("EXIT")
    smudged = Image.blend(sign("EXKT"), textured, 0.2)
    return [Image.blend(scene, textured, 0.1), written, textured, smudged]


def save_votes(folder):
    """Votes of people who prefer what is bright."""
    pictures = draw_pictures()
    light = [float(np.asarray(picture).mean()) for picture in pictures]
    said = []
    for i, j in itertools.combinations(range(len(pictures)), 2):
        said.append((pictures[i], pictures[j], "left" if light[i] > light[j] else "right"))
    fill(folder, said)
    return str(folder)


def judge(handler, body):
    """A judge that finds bright pictures good, whatever it is asked."""
    request = json.loads(body)
    # The source of an edit comes before it, and the words after it.
    *_, shown, _ = request["messages"][0]["content"]
    url = shown["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    light = float(np.asarray(picture).mean()) / 255
    if handler.path == "/pooling":
        reply(handler, {"data": [{"data": [15 * light, 0.1]}]})
        return
    tops = [{"token": "Yes", "logprob": math.log(light)}]
    text = f"Final Score: {1 + 4 * light:.6f}\nScores: {10 * light:.6f}, {10 * light:.6f}"
    choice = {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": tops}]}}
    reply(handler, {"choices": [choice]})


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Values of the keys that name weights and servers, by class, each made when it is needed."""
    folder = cache(tmp_path_factory.mktemp)
    clip = cache(lambda: save_clip(folder("clip")))
    aesthetic = cache(lambda: save_aesthetic(folder("aesthetic"))[1])
    votes = cache(lambda: save_votes(folder("votes")))
    hps = cache(lambda: save_hps(folder("hps"))[1])
    image_reward = cache(lambda: save_image_reward(folder("image_reward")))
    owlv2 = cache(lambda: save_owlv2(folder("owlv2")))
    mask2former = cache(lambda: save_mask2former(folder("mask2former")))
    with answering(judge) as judge_url, answering(scorer(brightness)) as scorer_url:
        yield {
            "CLIPScore": lambda: {"pretrained": clip(), "processor": clip()},
            "Aesthetic": lambda: {
                "pretrained": clip(),
                "processor": clip(),
                "weights": aesthetic(),
            },
            "HPSv2": lambda: {"architecture": "tiny-hps", "weights": hps()},
            "ImageReward": image_reward,
            "Colours": lambda: {"pretrained": clip(), "processor": clip()},
            "OWLv2": lambda: {"pretrained": owlv2()},
            "Mask2Former": lambda: {"pretrained": mask2former(), "shorter_side": 64},
            "Judge": lambda: {"url": judge_url},
            "Remote": lambda: {"url": scorer_url},
            "CLIPFeatures": lambda: {"pretrained": clip(), "processor": clip()},
            "Votes": lambda: {"folder": votes(), "min_votes": 4},
            "OCR": lambda: {"side": 320},
        }


def put_stand_ins(node, stand_ins):
    """Let every node of a reward's configuration name what the tests have."""
    if isinstance(node, DictConfig):
        name = str(node.get("_target_", "")).rpartition(".")[2]
        if name in EXTRAS:
            pytest.importorskip(EXTRAS[name])
        if name in stand_ins:
            node.update(stand_ins[name]())
        for key in node:
            put_stand_ins(node[key], stand_ins)
    elif isinstance(node, ListConfig):
        for item in node:
            put_stand_ins(item, stand_ins)


@pytest.fixture(scope="module", params=OPTIONS)
def reward(request, stand_ins):
    cfg = composed(f"reward={request.param}")
    OmegaConf.set_struct(cfg, False)
    put_stand_ins(cfg.reward, stand_ins)
    return instantiate(cfg.reward)


@pytest.fixture(scope="module")
def module(reward):
    return RewardModule(reward=reward, max_missing=1.0)


@pytest.fixture(scope="module")
def pictures(reward):
    """The pictures, in the size that each of a mixture's rewards takes."""
    names = {type(member).__name__ for member in doctor.members("reward", reward).values()}
    side = min(SIDES.get(name, SIDE) for name in names)
    return [picture.resize((side, side)) for picture in draw_pictures()]


@pytest.fixture(scope="module")
def whole(module, pictures):
    """The scores of all pictures at once."""
    return module.score(pictures, PROMPTS)


def assert_same(output, other, rows=slice(None), other_rows=slice(None), atol=1e-5):
    """Values, marks, terms and parts of some samples are those of others."""
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=atol, equal_nan=True)
    assert torch.equal(output.is_valid[rows], other.is_valid[other_rows])
    close(output.values[rows], other.values[other_rows])
    close(output.terms[rows], other.terms[other_rows])
    assert torch.equal(output.applies[rows], other.applies[other_rows])
    for name, part in output.parts.items():
        close(part[rows], other.parts[name][other_rows])


def test_its_output_is_well_formed(reward, module, pictures):
    """One number a sample throughout, all of them valid, without a gradient.

    Mutation: a score for the batch, parts under other names than `part_names`, or weights that
    train.
    """
    assert isinstance(reward, Reward)
    with torch.no_grad():
        output = check_output(reward(pictures, PROMPTS), len(pictures))
    assert output.is_valid.all(), output.info
    assert len(output.info) in (0, len(pictures))
    names = getattr(reward, "part_names", None)
    if names is not None:
        assert set(output.parts) == set(names)
    assert output.values[output.has_value.cpu()].isfinite().all()
    scored = module.score(pictures, PROMPTS)
    assert not scored.values.requires_grad
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert scored.has_value.all() and scored.values.unique().numel() > 1


def test_pictures_need_not_be_squares(reward, module, pictures):
    """Wide ones and tall ones, as tensors (B 3 H W), all of which have a score. Mutation: one side
    for both.
    """
    side = pictures[0].width
    if side != SIDE:
        pytest.skip("its pictures have one size")
    for size in ((side, side // 2), (side // 2, side)):
        scaled = [np.asarray(picture.resize(size)) for picture in pictures]
        images = torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2) / 255
        output = module.score(images, PROMPTS)
        assert output.has_value.all(), output.info


def test_scores_are_inside_their_range(reward, pictures):
    """As the doctor expects it of the class. Mutation: another scale or an offset."""
    for member in doctor.members("reward", reward).values():
        name = type(member).__name__
        expected = doctor.EXPECTED.get(name)
        if expected is not None and name not in UNBOUNDED:
            values = RewardModule(reward=member, max_missing=0.0).score(pictures, PROMPTS).values
            assert (values >= expected.low).all() and (values <= expected.high).all()


def test_higher_is_better(reward):
    """The good image of each pair that the class is made for. Mutation: flip the sign."""
    for member in doctor.members("reward", reward).values():
        name = type(member).__name__
        key, setting = UNORDERED.get(name, ("", None))
        expected = doctor.EXPECTED.get(name)
        if expected is None or name in RANDOM or getattr(member, key, "") == setting:
            continue
        chosen = [pair for pair in pairs() if pair.kind in expected.kinds]
        scores = RewardModule(reward=member, max_missing=0.0).score
        good = scores([pair.good for pair in chosen], [pair.prompt for pair in chosen]).values
        bad = scores([pair.bad for pair in chosen], [pair.prompt for pair in chosen]).values
        # A pair of sizes has the smaller file for its good one, which a positive scale likes less.
        is_reversed = expected.kinds == ("size",) and member.scale > 0
        assert (good < bad if is_reversed else good > bad).all(), (good, bad)


def test_it_repeats_and_draws_from_no_shared_stream(module, whole, pictures):
    """Python's own stream is left out: the suite's type checks draw from it.

    Mutation: a random crop, or dropout at work.
    """
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    assert_same(module.score(pictures, PROMPTS), whole, atol=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state


def test_tensors_give_what_pictures_give(module, whole, pictures):
    """Mutation: another resize for tensors, or no rounding to 8 bits."""
    assert_same(module.score(to_tensor(pictures), PROMPTS), whole, atol=1e-6)


def test_each_sample_is_scored_by_itself_and_in_its_place(module, whole, pictures):
    """Alone, in another order, and beside others. Mutation: a statistic of the batch, the first
    prompt for all, or padding to the longest text without its mask.
    """
    for row in range(len(pictures)):
        rows = slice(row, row + 1)
        assert_same(module.score(pictures[rows], PROMPTS[rows]), whole, other_rows=rows)
    order = [2, 0, 3, 1]
    moved = module.score([pictures[row] for row in order], [PROMPTS[row] for row in order])
    assert_same(moved, whole, other_rows=order)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_image_that_is_not_finite_costs_its_own_score_alone(module, whole, pictures, value):
    """It is missing and says why. Mutation: show the scorer all images, which loses all of them."""
    images = to_tensor(pictures)
    images[1, 0, 0, 0] = value
    output = module.score(images, PROMPTS)
    assert output.is_valid.tolist() == [True, False, True, True]
    assert output.info[1]["missing"] == NOT_FINITE
    others = [0, 2, 3]
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(output.values[others], whole.values[others])
    close(output.terms[others], whole.terms[others], equal_nan=True)
