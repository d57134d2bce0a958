"""Subsets of prompt sets, and prompts that are the same one."""

import json
from collections import Counter

import pytest

from flowrl.evaluation.evaluator import Evaluator
from flowrl.prompts.files import file_prompts
from flowrl.prompts.subsets import chosen, same_texts
from flowrl.samplers.ode import ODE
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import LinearShift
from flowrl.types import Prompt


def evaluator(prompts, max_prompts=None, **changes):
    settings = {
        "schedule": LinearShift(shift=1.0),
        "num_steps": 1,
        "guidance_scale": 1.0,
        "images_per_prompt": 1,
        "batch_size": 2,
        "headline": "reward",
        "solver": ODE(),
        "sampler": FlowSDE(noise_level=0.7),
        "kl_samples": 1,
        "seed": 0,
        "subset": "even",
    }
    return Evaluator(sets={"own": prompts}, max_prompts=max_prompts, **settings | changes)


def test_a_file_sorted_by_family_keeps_its_shares(tmp_path):
    """200 lines each of a, b and c: 256 of them are 85 or 86 each. Mutation: the first ones, a:200,
    b:56, c:0.
    """
    rows = [{"prompt": f"p{i}", "tag": "abc"[i // 200]} for i in range(600)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = file_prompts(str(tmp_path / "a.jsonl"))
    taken = evaluator(prompts, 256)
    counts = Counter(prompt.family for prompt in taken.sets["own"])
    assert sorted(counts.values()) == [85, 85, 86] and taken.sets == evaluator(prompts, 256).sets
    assert len({prompt.text for prompt in taken.sets["own"]}) == 256
    assert taken.describe("own") == "256 of 600 prompts, evenly spread"
    assert (
        evaluator(prompts).describe("own")
        == evaluator(prompts, 600).describe("own")
        == "600 prompts"
    )


def test_a_file_that_takes_its_families_in_turn_is_not_fallen_in_step_with():
    """Every eighth of 800 lines that count to eight. Mutation: fixed distances, which take one
    family alone.
    """
    counts = Counter(i % 8 for i in chosen(800, 100, "even"))
    assert len(counts) == 8 and max(counts.values()) <= 25


@pytest.mark.parametrize(
    ("total", "wanted"), [(600, 256), (7, 7), (7, 6), (10, 1), (5, None), (5, 9), (5, 0)]
)
def test_places_are_in_order_and_one_from_each_stretch(total, wanted):
    """Mutation: draw with replacement, or lose the last line."""
    places = chosen(total, wanted, "even")
    count = total if wanted is None else min(total, wanted)
    assert len(places) == count
    for i, place in enumerate(places):
        assert i * total // count <= place < (i + 1) * total // count


def test_sets_that_are_drawn_by_lot_keep_their_first_ones():
    """Which recorded runs took, and runs of before the key; another word is refused. Mutation:
    spread them too.
    """
    prompts = [Prompt(str(i)) for i in range(9)]
    taken = evaluator(prompts, 4, subset="first")
    assert taken.sets["own"] == prompts[:4] and taken.describe("own") == "4 of 9 prompts, the first"
    assert taken.places_of(9, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"evaluation\.subset=last must be first or even"):
        evaluator(prompts, 4, subset="last")


def test_repeated_lines_are_told():
    """One text is one prompt, whatever its metadata. Mutation: go by line, or by metadata that
    number the lines.
    """
    prompts = [Prompt("a", "x", {"id": 0}), Prompt("b"), Prompt("a", "x", {"id": 1}), Prompt("c")]
    assert same_texts(prompts).tolist() == [0, 1, 0, 2]
    told = "4 prompts; 3 different texts, each of which counts once in intervals"
    assert evaluator(prompts).describe("own") == told
