import math
import random
import time

import numpy as np
import pytest
import torch

from flowrl.prompts.shapes import shapes_prompts
from flowrl.rewards.shapes import ShapesReward
from flowrl.shapes.grammar import COLOURS, FAMILIES, RELATIONS, SHAPES, parse, sample_caption
from flowrl.shapes.render import IMAGE_SIZE, PALETTE, Placed, lay_out, render
from flowrl.shapes.verify import verify
from flowrl.types import Prompt


def truth(count, seed=0):
    """`count` captions in equal shares of the families, and true images of them."""
    rng = random.Random(seed)
    captions = [sample_caption(FAMILIES[i % len(FAMILIES)], rng) for i in range(count)]
    return captions, render([lay_out(caption, rng) for caption in captions])


def drawn(*objects):
    """A picture of (colour, shape, x, y) of radius 4.5."""
    return render(
        [[Placed(SHAPES.index(s), COLOURS.index(c), x, y, 4.5) for c, s, x, y in objects]]
    )


def atoms(prompt, *objects):
    return verify(drawn(*objects), [parse(prompt)])[0].atoms


def test_ground_truth_is_strictly_right():
    """Above 99 % of 5,000 renders, and 98 % of every family. Mutation: any template, palette entry
    or threshold.
    """
    captions, images = truth(5000)
    strict = {family: [] for family in FAMILIES}
    for caption, verdict in zip(captions, verify(images, captions), strict=True):
        strict[caption.family].append(verdict.strict)
    assert np.mean([value for values in strict.values() for value in values]) > 0.99
    assert min(np.mean(values) for values in strict.values()) > 0.98


def test_another_caption_is_strictly_wrong():
    """Mutation: a verifier that says yes."""
    captions, images = truth(300)
    others = captions[1:] + captions[:1]
    wrong = [verdict.strict for verdict in verify(images, others)]
    assert np.mean(wrong) < 0.05


LEFT, RIGHT = ("red", "circle", 8, 16), ("blue", "square", 24, 16)


@pytest.mark.parametrize(
    ("prompt", "objects", "expected"),
    [
        ("a red circle", [("green", "circle", 16, 16)], {"shape_0": 1, "colour_0": 0, "extras": 1}),
        ("a circle", [("red", "square", 16, 16)], {"shape_0": 0, "extras": 1}),
        ("a red circle and a blue square", [LEFT, ("red", "square", 24, 16)], {"colour_1": 0}),
        (
            "a red circle and a blue square",
            [("blue", "circle", 8, 16), ("red", "square", 24, 16)],
            {"colour_0": 0, "colour_1": 0},
        ),
        ("a circle and a cross", [LEFT, RIGHT], {"shape_1": 0}),
        (
            "two circles",
            [(*LEFT[:2], x, y) for x in (8, 24) for y in (8, 24)],
            {"count_0": 0, "extras": 0},
        ),
        ("four circles", [LEFT], {"shape_0": 0.25, "count_0": 0.25, "extras": 0.25}),
        ("a circle left of a square", [LEFT, RIGHT], {}),
        ("a circle right of a square", [LEFT, RIGHT], {"relation": 0}),
        ("a circle above a square", [LEFT, RIGHT], {"relation": 0}),
        ("a circle above a square", [("red", "circle", 16, 8), ("blue", "square", 16, 24)], {}),
        (
            "a circle below a square",
            [("red", "circle", 16, 8), ("blue", "square", 16, 24)],
            {"relation": 0},
        ),
        ("a circle", [LEFT, RIGHT], {"extras": 0}),
        ("a red circle", [LEFT], {}),
    ],
)
def test_a_mistake_costs_its_own_atom(prompt, objects, expected):
    """Atoms not named are 1. Mutation: swap two relations' signs, colours found anywhere, extras
    not counted.
    """
    got = atoms(prompt, *objects)
    assert got == pytest.approx({**dict.fromkeys(got, 1.0), **expected}, abs=1e-12)
    assert got.keys() >= expected.keys()


def test_smears_count_as_extra_objects():
    """A thin red bar is no clean shape, but it is something. Mutation: count clean objects
    alone.
    """
    image = drawn(RIGHT)
    image[0, 2:4, 2:22] = PALETTE[COLOURS.index("red")]
    assert verify(image, [parse("a blue square")])[0].atoms == {
        "shape_0": 1,
        "colour_0": 1,
        "extras": 0,
    }


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a circle left of a square", False),  # 0 + 0 + 2
        ("a circle left of a circle", True),  # 0 + 0 + 0
        ("a triangle above a square", True),  # 2 + 2 + 2
        ("a red circle left of a square", True),  # its pair
        ("a green circle left of a square", False),
        ("a green cross and a blue cross", False),
        ("a green cross and a red cross", True),  # 0 + 2 * 3
    ],
)
def test_held_out_by_hand(prompt, expected):
    """Mutation: look at pairs or at triples alone, or at the first phrase alone."""
    assert parse(prompt).is_held_out == expected


def test_scores_by_hand():
    """Atoms 1/4, 1/4, 1/4 and 1, 0, 1. Mutation: geometric for soft, or strict at any atom."""
    quarter = verify(drawn(LEFT), [parse("four circles")])[0]
    assert (quarter.soft, quarter.geometric, quarter.strict) == pytest.approx((0.25, 0.25, 0))
    wrong = verify(drawn(("green", "circle", 16, 16)), [parse("a red circle")])[0]
    assert (wrong.soft, wrong.geometric, wrong.strict) == pytest.approx((2 / 3, 0.1, 0))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((32, 32, 3), np.float32),
        np.ones((32, 32, 3), np.float32),
        np.random.default_rng(0).random((32, 32, 3), np.float32),
        np.full((32, 32, 3), np.nan, np.float32),
        np.full((32, 32, 3), np.inf, np.float32),
        np.full((32, 32, 3), -np.inf, np.float64),
        np.full((32, 32, 3), 1e30, np.float32),
        np.zeros((1, 1, 3), np.float32),
        np.ones((17, 50, 3), np.float16),
    ],
)
def test_no_picture_raises_or_pleases(image):
    """Mutation: let NaN or another size through to the labelling."""
    captions = [parse("a red circle above a blue square")]
    verdict = verify(image[None], captions)[0]
    assert verdict.strict == 0
    assert all(0 <= value <= 1 for value in verdict.atoms.values())
    assert 0 <= verdict.off_palette <= 1


def test_other_sizes_are_read_alike():
    """A render blown up four times. Mutation: resample height with the width's factor."""
    captions, images = truth(70)
    large = images.repeat(4, axis=1).repeat(4, axis=2)
    assert np.mean([verdict.strict for verdict in verify(large, captions)]) > 0.9


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 32, 32)),
        np.zeros((1, 3, 32, 32)),
        np.zeros((1, 32, 32, 3), np.uint8),
        np.zeros((1, 0, 32, 3)),
    ],
)
def test_what_is_no_image_is_refused(images):
    """Mutation: guess the layout."""
    with pytest.raises(ValueError, match="images must be"):
        verify(images, [parse("a circle")])


def test_one_caption_an_image():
    """Mutation: zip without looking."""
    with pytest.raises(ValueError, match="1 images for 2 captions"):
        verify(drawn(LEFT), [parse("a circle")] * 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a red",
        "circle",
        "a circles",
        "two circle",
        "five circles",
        "a pink circle",
        "a circle on a square",
        "a circle and a square and a cross",
        "three circles and two squares",
        "A circle",
        "a red circle above",
    ],
)
def test_text_outside_the_grammar_is_named(text):
    """Mutation: read what fits and ignore the rest."""
    with pytest.raises(ValueError, match="outside the shapes grammar"):
        parse(text)


def test_scoring_is_fast():
    """256 images in 0.3 s on one core, best of three. Mutation: loop over images in Python."""
    captions, images = truth(256)
    times = []
    for _ in range(3):
        start = time.process_time()
        verify(images, captions)
        times.append(time.process_time() - start)
    assert min(times) < 0.3


def test_layouts_keep_their_distance_and_fulfil_relations():
    """Mutation: check the relation of the first object alone, or allow overlap."""
    rng = random.Random(0)
    for relation in RELATIONS:
        caption = parse(f"two circles {relation} a red square")
        for _ in range(20):
            *circles, square = lay_out(caption, rng)
            for circle in circles:
                gap = {"left of": square.x - circle.x, "right of": circle.x - square.x}
                gap |= {"above": square.y - circle.y, "below": circle.y - square.y}
                assert gap[relation] >= circle.radius + square.radius
            assert all(
                edge.radius < edge.x < IMAGE_SIZE - edge.radius for edge in (*circles, square)
            )


def test_a_caption_without_a_layout_is_an_error():
    """Mutation: search for a layout for ever."""
    with pytest.raises(ValueError, match="three circles left of a cross"):
        lay_out(parse("three circles left of a cross"), random.Random(0))


def test_held_out_split():
    """Reserved combinations never appear in training and always in the other set, across families.

    Mutation: drop the relation triples from the rule, or filter one split only.
    """
    held_in, held_out = (
        shapes_prompts(split=split, count=700, seed=1) for split in ("held_in", "held_out")
    )
    assert not any(parse(prompt.text).is_held_out for prompt in held_in)
    assert all(parse(prompt.text).is_held_out for prompt in held_out)
    assert not {prompt.text for prompt in held_in} & {prompt.text for prompt in held_out}
    assert {
        family: sum(p.family == family for p in held_in) for family in FAMILIES
    } == dict.fromkeys(FAMILIES, 100)
    reserved = {(c, s) for c in COLOURS for s in SHAPES if parse(f"a {c} {s}").is_held_out}
    assert len(reserved) == len(SHAPES)  # one colour of each shape: red circle, yellow square, ...
    assert {shape for _, shape in reserved} == set(SHAPES)
    assert shapes_prompts(split="held_in", count=20, seed=1) == held_in[:20]
    assert shapes_prompts(split="held_in", count=20, seed=2) != held_in[:20]


def test_reward_reads_images_channels_first_and_marks_foreign_prompts():
    """Mutation: permute to (W, H), score prompts outside the grammar as 0, or mix up the scores."""
    objects = ("red", "circle", 16, 8), ("blue", "square", 16, 24)
    images = torch.from_numpy(drawn(*objects)).permute(0, 3, 1, 2).repeat(3, 1, 1, 1)
    prompts = [
        Prompt(text)
        for text in ("a red circle above a blue square", "a circle left of a square", "a cat")
    ]
    for score, values in (("soft", [1, 0.75]), ("strict", [1, 0]), ("geometric", [1, 1e-3**0.25])):
        output = ShapesReward(score=score)(images, prompts)
        assert output.values[:2].tolist() == pytest.approx(values, rel=1e-6)
        assert output.is_valid.tolist() == [True, True, False]
        assert output.parts["soft"][:2].tolist() == pytest.approx([1, 0.75])
        assert output.parts["clean_objects"].tolist() == [1, 1, 1]
    empty = ShapesReward(score="soft")(torch.full((1, 3, 32, 32), 0.93), prompts[:1])
    assert math.isnan(empty.parts["clean_objects"].item())
    assert empty.values.item() == 0


def test_a_prompt_set_of_some_families():
    """Mutation: ignore the families, or accept one that the split cannot have."""
    prompts = shapes_prompts(split="held_in", count=20, seed=1, families=["position", "counting"])
    assert [prompt.family for prompt in prompts[:4]] == ["counting", "position"] * 2
    for split, families in (("held_in", ["countin"]), ("held_in", []), ("held_out", ["counting"])):
        with pytest.raises(ValueError, match="families"):
            shapes_prompts(split=split, count=1, seed=1, families=families)
