"""The numbers that evaluate.py sums up, from samples written by hand, and where its page shows
them.
"""

import base64
import io
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from flowrl.evaluation.page import SOURCE, _gallery, render
from flowrl.evaluation.samples import Assessment
from flowrl.evaluation.summary import gallery, numbers
from flowrl.images.clips import evenly
from flowrl.images.contact_sheet import save_sample, to_pil
from flowrl.images.pictures import read_frames
from flowrl.types import PictureFile, Prompt

FAMILIES = ("atom_count_10", "atom_count_9", "", "atom_count_9")


class Drawn(Assessment):
    """Four prompts, one value each of the headline `strict` and of the reward; a NaN is missing."""

    def __init__(self, folder, strict, reward):
        prompts = [Prompt(f"prompt <{i}>", family) for i, family in enumerate(FAMILIES)]
        self.evaluator = SimpleNamespace(
            headline="strict",
            sets={"own": prompts},
            images_per_prompt=1,
            describe=lambda name: "4 of 9 prompts",
        )
        self.columns = {
            "strict": np.array(strict),
            "reward": np.array(reward),
            "spread": np.full(4, 4.0),
        }
        self.folder = folder
        (folder / "own").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "own" / "a.png")

    def prompt_means(self, name):
        return dict(self.columns)

    def samples(self, name):
        values = zip(self.columns["strict"], self.columns["reward"], strict=True)
        known = [{"strict": None if math.isnan(s) else s} for s, _ in values]
        return [
            {
                "is_valid": parts["strict"] is not None,
                "parts": parts,
                "reward": 0.5,
                "file": "a.png",
            }
            for parts in known
        ]

    def drift(self, name):
        return {"kl_ref": 0.25}


@pytest.fixture
def both(tmp_path):
    before = Drawn(tmp_path / "a", [0.0, 0.5, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0])
    return {
        "base": before,
        "run": Drawn(tmp_path / "b", [1.0, 1.0, math.nan, 1.0], [0.5, 0.5, 0.5, 0.5]),
    }


def test_numbers_by_family(both):
    """Of the headline, prompt by prompt; 9 atoms before 10. Mutation: of the reward, or in the
    order of the names.
    """
    found = numbers(both["run"], "own", both["base"])
    assert found["headline"] == "strict" and list(found["families"]) == [
        "atom_count_9",
        "atom_count_10",
    ]
    nine, ten = found["families"].values()
    assert nine == {"mean": 1, "low": None, "high": None, "num_prompts": 2}
    assert ten == {"mean": 1, "low": None, "high": None, "num_prompts": 1}
    assert found["family_changes"]["atom_count_9"]["mean"] == 0.75
    assert numbers(both["base"], "own", None)["family_changes"] == {}


def test_lines_with_one_text_are_one_prompt(both):
    """Of two prompts there is no interval, on four lines no more than on two; nor of their
    differences.

    Mutation: lines for prompts, in the whole set, a change or a family.
    """
    for each in both.values():
        each.evaluator.sets["own"] = [
            Prompt("a", "x"),
            Prompt("b", "x"),
            Prompt("a", "x", {"id": 3}),
            Prompt("b", "x"),
        ]
    found = numbers(both["run"], "own", both["base"])
    for estimate in (
        found["metrics"]["reward"],
        found["changes"]["reward"],
        found["family_changes"]["x"],
    ):
        assert (estimate["num_prompts"], estimate["low"]) == (2, None)
    assert found["families"]["x"]["num_prompts"] == found["diversity"]["num_prompts"] == 2


def test_numbers_of_the_whole_set(both):
    """Three prompts of four have a value; a spread of 4 is a distance of 2.

    Mutation: count the missing prompt as 0, or the mean square as the distance.
    """
    found = numbers(both["run"], "own", both["base"])
    assert (
        found["metrics"]["strict"]["num_prompts"] == 3 and found["metrics"]["strict"]["mean"] == 1
    )
    gain = found["changes"][
        "strict"
    ]  # 1, 1/2 and 1, of which Student's interval is 4.303 / 6 either side
    assert (gain["low"], gain["mean"], gain["high"]) == pytest.approx(
        (0.116, 0.833, 1.55), abs=1e-3
    )
    assert found["diversity"] == {"mean": 2, "low": 2, "high": 2, "num_prompts": 4}
    assert (found["missing"], found["kl_ref"], found["num_images"]) == (0.25, 0.25, 4)


def test_a_few_different_spreads_have_an_interval_that_ends_at_zero(both):
    """Mean squares 0, 0, 0 and 8: Student's interval of the mean reaches below 0.

    Mutation: take the root of what is below 0, which is no number that JSON has.
    """
    both["run"].evaluator.sets["own"] = [Prompt(text) for text in "abcd"]
    both["run"].columns["spread"] = np.array([0.0, 0.0, 0.0, 8.0])
    diversity = numbers(both["run"], "own", both["base"])["diversity"]
    assert diversity["low"] == 0
    assert diversity["mean"] == pytest.approx(math.sqrt(2))
    json.dumps(diversity)


def test_the_page_shows_what_was_edited(both, tmp_path):
    """Before the images, without a score. Mutation: leave it out, or score it."""
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "source.png")
    own = both["base"].evaluator.sets["own"]
    own[0] = replace(own[0], image=PictureFile(str(tmp_path / "source.png"), "0"))
    rows = gallery(both, "own", 9)
    assert [label for label, _, _ in rows[0][2]] == [SOURCE, "base", "run"]
    assert [label for label, _, _ in rows[1][2]] == ["base", "run"]
    shown = _gallery(rows)[0]["pictures"]
    assert [bool(picture.score) for picture in shown] == [False, True, True]


def test_the_page_shows_families_and_pictures(both):
    """Mutation: a metric of the panel among the rewards, a family without its change, or a prompt
    as markup.
    """
    results = {
        label: numbers(each, "own", both["base"] if label == "run" else None)
        for label, each in both.items()
    }
    page = render("base and run", "4 images", {"own": results}, {"own": gallery(both, "own", 9)})
    assert "4 of 9 prompts." in page and results["run"]["prompts"] == "4 of 9 prompts"
    row = page[page.index("atom count 9") :].split("</tr>")[0]
    assert (
        "2 prompts" in row
        and "+0.75" in row
        and "<span class='up'>+0.833</span>" in page
        and "<svg" in page
    )
    assert (
        page.count("data:image/png;base64,") == 8
        and "prompt <" not in page
        and "prompt &lt;" in page
    )
    assert page.count("no score") == 1
    plain = [each | {"families": {}} for each in results.values()]
    assert "Task families" not in render("a", "b", {"own": dict(zip("ab", plain, strict=True))}, {})


def test_the_page_plays_clips_and_tells_their_motion(both):
    """Twenty frames of an animated PNG become a WebP of sixteen, the first and the last among
    them; motion has rows where it was measured, and nowhere else.

    Mutation: embed the first frame, or every frame; or show the rows for pictures.
    """
    levels = torch.arange(20)[:, None, None, None] * 10 / 255
    for each in both.values():
        save_sample(levels.expand(20, 3, 8, 8), each.folder / "own" / "a.png")
    results = {"base": numbers(both["base"], "own", None)}
    page = render("a", "b", {"own": results}, {"own": gallery(both, "own", 1)})
    assert "motion" not in page
    first, second = re.findall("data:image/webp;base64,([^']+)", page)
    assert first == second and "data:image/png" not in page
    with Image.open(io.BytesIO(base64.b64decode(first))) as picture:
        seen = [
            frame.convert("RGB").getpixel((2, 2))[0] for frame in ImageSequence.Iterator(picture)
        ]
    assert seen == [10 * number for number in evenly(20, 16)]
    both["base"].columns |= {
        "panel/motion": np.array([0.1, 0.2, 0.3, 0.2]),
        "panel/motion_variation": np.full(4, 0.5),
    }
    results = {"base": numbers(both["base"], "own", None)}
    page = render("a", "b", {"own": results}, {})
    row = page[page.index("motion <small>mean absolute") :].split("</tr>")[0]
    assert "0.2" in row and "motion variation" in page


def test_a_clip_is_stored_without_loss(tmp_path):
    """With what a PNG says of itself. Mutation: store it by a format that blurs."""
    clip = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    notes = PngInfo()
    notes.add_text("prompt", "a red circle")
    save_sample(clip, tmp_path / "clip.png", pnginfo=notes)
    frames = read_frames(tmp_path / "clip.png")
    assert [
        np.array_equal(frame, to_pil(own)) for frame, own in zip(frames, clip, strict=True)
    ] == [True] * 3
    with Image.open(tmp_path / "clip.png") as picture:
        assert picture.text["prompt"] == "a red circle"
    save_sample(clip[0], tmp_path / "picture.png")
    assert len(read_frames(tmp_path / "picture.png")) == 1
