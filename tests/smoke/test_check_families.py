"""The table of families: what is asked for is tried, what is done stays, and one family from end to
end.
"""

import json
from pathlib import Path

import pytest
from families import FAMILIES
from families.pictures import pictures_of, with_pictures
from runs import load_script

from flowrl.cli.parity import PROMPTS
from flowrl.errors import UserError
from flowrl.images.pictures import read_upright
from flowrl.prompts.jsonl import jsonl_prompts

TRAINED = {
    "family": "wan21",
    "pipeline": "WanPipeline",
    "notes": ["all weights trained"],
    "state": [4, 3, 8, 12],
    **dict.fromkeys(("velocity", "rollout", "image", "replay"), 0.0),
    "rows": 0.00000123,
    "gradients": 20,
    "trained": 40,
    "alone": True,
    "milliseconds": 9.0,
    "outside": 1.26,
    "iterations": 2,
    "export": "load_lora_weights",
}


@pytest.fixture(scope="module")
def script():
    return load_script("check_families")


def test_the_page_has_a_line_for_each_family(script):
    """In the families' order, refused ones with their sentence apart, and what is missing; no cell
    is cut by a bar.

    Mutation: print them in the order of measurement.
    """
    rows = {
        "wan21": TRAINED,
        "edm": {"family": "edm", "pipeline": "P", "notes": [], "refused": "it has a | b"},
        "sd3": TRAINED | {"family": "sd3", "notes": []},
    }
    lines = script.page(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| `")] == [
        "| `sd3`",
        "| `wan21`",
        "| `edm`",
    ]
    assert (
        "| `wan21` | WanPipeline | 4 x 3 x 8 x 12 | 0 | 0 | 0 | 1e-06 | 0 | 20 of 40 | "
        "2 iterations, all weights trained, one row a call | load_lora_weights | 1.3 |" in lines
    )
    assert "| `edm` | it has a \\| b |" in lines
    missing = [name for name in FAMILIES if name not in rows]
    assert lines[-1] == f"Not measured yet: {', '.join(f'`{name}`' for name in missing)}."


def test_what_a_refusal_asks_for_is_tried_once(script):
    """And is noted. Mutation: try it for ever, or forget the note."""
    seen = []

    def work(overrides):
        seen.append(list(overrides))
        if len(seen) == 1:
            raise UserError("tuning=lora: none is added; set tuning=full")
        raise UserError("it is what it is; set tuning=full")

    notes = []
    with pytest.raises(UserError, match="it is what it is"):
        script.with_remedies(["a=1"], notes, work)
    assert seen == [["a=1"], ["a=1", "tuning=full"]] and notes == ["all weights trained"]


def test_a_family_that_takes_a_picture_is_given_one_beside_each_prompt(tmp_path):
    """The very pictures of the check go into the run's file, a lying and a standing one; a family
    that takes none has none. Mutation: give both prompts the first picture.
    """
    pictures = pictures_of(FAMILIES["wan22_i2v"])
    assert [picture.size for picture in pictures] == [(48, 40), (40, 48)]
    data, path = with_pictures(PROMPTS, pictures, tmp_path / "prompts")
    assert data == "data=jsonl" and path.startswith("data.prompts.path=")
    file = path.removeprefix("data.prompts.path=")
    prompts = jsonl_prompts(path=file, text="prompt", family=None, required=[], image="image")
    assert [prompt.text for prompt in prompts] == list(PROMPTS)
    for prompt, picture in zip(prompts, pictures, strict=True):
        assert read_upright(Path(prompt.image.path)).tobytes() == picture.tobytes()
    assert pictures_of(FAMILIES["wan21"]) == []


def test_a_table_that_was_broken_off_goes_on(script, tmp_path, monkeypatch, capsys):
    """What is missing is measured, and written family by family. Mutation: begin anew."""
    record = tmp_path / "families.jsonl"
    first, second, *_ = FAMILIES
    record.write_text(json.dumps({"family": first, "refused": "kept"}) + "\n")
    measured = []

    def measure(name):
        measured.append(name)
        if name != second:
            raise KeyboardInterrupt
        return {"family": name, "refused": "new"}

    monkeypatch.setattr(script, "measure_apart", measure)
    monkeypatch.setattr("sys.argv", ["check_families.py", "--record", str(record)])
    with pytest.raises(KeyboardInterrupt):
        script.main()
    assert measured[0] == second and len(measured) == 2
    assert list(script.read_record(record)) == [first, second]
    assert json.loads(capsys.readouterr().out)["refused"] == "new"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z_image", "wan22_i2v"])
def test_a_family_from_end_to_end(name, script):
    """In a process of its own. Mutations: compare the export with other weights, or give a family
    that needs pictures none.
    """
    row = script.measure_apart(name)
    assert "failed" not in row and "refused" not in row, row
    assert (row["velocity"], row["rollout"], row["image"], row["replay"]) == (0, 0, 0, 0)
    assert row["iterations"] == 2 and row["export"] == "load_lora_weights"
    assert 0 < row["gradients"] <= row["trained"] and row["outside"] > 0
