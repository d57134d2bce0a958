"""Tables and figures of a study's record, which is written by hand."""

import pytest
from study_by_hand import REWARD, finish

from flowrl.studies.document import fill, pieces
from flowrl.studies.figures import draw, looks, marker, style
from flowrl.studies.record import load
from flowrl.studies.tables import edges


def test_the_edge_of_a_grid():
    """Mutation: call a single value an edge."""
    grid = ["lr=1 clip=5", "lr=2 clip=5", "lr=3 clip=5"]
    assert [edges(variant, grid) for variant in grid] == ["lr", "no", "lr"]


def test_every_number_comes_from_the_record(study_place):
    """Tables by hand; a changed record changes them. Mutation: keep what a block held, or mix
    conditions up.
    """
    results, study = finish(study_place), study_place.study("mine")
    own = pieces(study, results)
    found = own.texts
    assert found["mine/main/base model/soft"] == "0.5"
    assert (
        found["mine/main/grpo/soft"] == "0.75"
    )  # 0.5 + 0.0625 for its tuned rate + its seed's gain
    assert found["mine/main/dppo/both"] == "0.562"
    row = "mine/comparisons/dppo against grpo"
    assert found[f"{row}/soft, difference"] == "+0.125"
    assert found[f"{row}/KL, difference"] == "-0.25"
    assert (
        found["mine/chosen/dppo/chosen"] == "lr=2"
        and found["mine/chosen/dppo/at the edge of its grid"] == "no"
    )
    assert "14 of 14 runs, 0 of them failed" in found["mine/status"]
    text = (
        "Gain <!-- begin mine/main/dppo/soft -->9.9<!-- end -->.\n<!-- begin mine/main "
        "-->\nold\n<!-- end -->\n"
    )
    filled = fill(text, {"mine": own})
    assert (
        "Gain <!-- begin mine/main/dppo/soft -->0.875<!-- end -->." in filled
        and "old" not in filled
    )
    assert fill(filled, {"mine": own}) == filled
    results["runs"][-1]["evaluations"][-1][REWARD] = 0.0
    assert fill(filled, {"mine": pieces(study, results)}) != filled
    with pytest.raises(ValueError, match="mine/main/dpo/soft"):
        fill("<!-- begin mine/main/dpo/soft --><!-- end -->", {"mine": own})
    del results["runs"][-1]
    partly = fill("<!-- begin mine/main/dpo/soft --><!-- end -->", {"mine": pieces(study, results)})
    assert (
        "_not run yet_" in partly
        and "**Incomplete:**" in pieces(study, results).texts["mine/status"]
    )


def test_without_a_record_nothing_is_claimed(study_place):
    """Mutation: leave an old number standing."""
    found = pieces(study_place.study("mine"), load(study_place.results("mine")))
    text = fill(
        "<!-- begin mine/main/dppo/soft -->0.9<!-- end --> <!-- begin mine/status --><!-- end -->",
        {"mine": found},
    )
    assert (
        "0.9" not in text
        and "_not run yet_" in text
        and "**Not run yet.** Planned: 14 runs" in text
    )


def test_figures_are_the_same_bytes_from_the_same_record(study_place, tmp_path):
    """Mutation: let the date or random ids into the files, leave a figure out, or draw every stage
    in each.
    """
    results, study = finish(study_place), study_place.study("mine")
    first = [path.read_bytes() for path in draw(study, results, tmp_path / "a")]
    assert [path.read_bytes() for path in draw(study, results, tmp_path / "b")] == first
    assert len(first) == 8 and len(set(first)) == 8
    learning, tuning = (
        (tmp_path / "a" / f"{name}.svg").read_text() for name in ("learning", "tuning")
    )
    assert "lr=2" in tuning and "lr=2" not in learning


def test_a_method_keeps_its_colour():
    """Its variants have markers of their own; where they are too many, or unknown, all are
    numbered.

    Mutation: number by the place in the figure, or give two conditions one look.
    """
    assert (
        looks(["flow_cps", "diffusion_nft"])
        == looks(["flow_cps proxy", "diffusion_nft proxy"])
        == [1, 3]
    )
    numbers = looks(["flow_dppo a", "flow_cps", "flow_dppo b"])
    assert numbers[1] == 1 and style(numbers[0])["color"] == style(numbers[2])["color"]
    assert marker(numbers[0]) != marker(numbers[2]) and style(numbers[0]) != style(numbers[2])
    assert looks([f"flow_dppo {i}" for i in range(12)]) == list(range(12))
    assert looks(["mine", "yours"]) == [0, 1]
