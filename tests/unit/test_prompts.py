import json

import pytest

from flowrl.prompts.compositions import (
    MATERIALS,
    OBJECTS,
    Composition,
    Phrase,
    composition_prompts,
)
from flowrl.prompts.jsonl import jsonl_prompts
from flowrl.types import Prompt


def write(path, *rows):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n\n"
    )
    return str(path)


GENEVAL = {
    "tag": "two_object",
    "include": [{"class": "bench", "count": 1}],
    "prompt": "a photo of a bench",
}
GENEVAL2 = {
    "prompt": "two red cows",
    "atom_count": 3,
    "vqa_list": [["Are the cows red?", "Yes"]],
    "skills": ["colour"],
}


def test_the_two_published_formats(tmp_path):
    """Mutation: lose the metadata, or name a family by a bare number, which is no name of a
    metric.
    """
    got = jsonl_prompts(
        path=write(tmp_path / "a", GENEVAL), text="prompt", family="tag", required=["include"]
    )
    assert got == [
        Prompt("a photo of a bench", "two_object", {k: GENEVAL[k] for k in ("tag", "include")})
    ]
    got = jsonl_prompts(
        path=write(tmp_path / "b", GENEVAL2),
        text="prompt",
        family="atom_count",
        required=["vqa_list"],
    )
    assert got[0].family == "atom_count_3" and got[0].metadata["vqa_list"] == [
        ["Are the cows red?", "Yes"]
    ]


def test_other_keys_and_slashes(tmp_path):
    """Mutation: keep the slash, which parts a metric's name."""
    path = write(tmp_path / "a", {"caption": "x", "kind": "a/b"}, "", {"caption": "y", "kind": "c"})
    got = jsonl_prompts(path=path, text="caption", family="kind", required=[])
    assert [(prompt.text, prompt.family) for prompt in got] == [("x", "a_b"), ("y", "c")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["not json"], "line 1: not JSON"),
        ([{"prompt": "a", "tag": "b"}, ["a"]], "line 2: a JSON object"),
        ([{"text": "a"}], "line 1: no 'prompt'; it has 'text'"),
        ([{"prompt": "a"}], "line 1: no 'tag'"),
        ([], "holds no prompt"),
    ],
)
def test_a_bad_line_is_named(tmp_path, rows, words):
    """Mutation: skip it, or raise a KeyError."""
    with pytest.raises(ValueError, match=words):
        jsonl_prompts(path=write(tmp_path / "a", *rows), text="prompt", family="tag", required=[])
    with pytest.raises(ValueError, match="no such file"):
        jsonl_prompts(path=str(tmp_path / "none"), text="prompt", family=None, required=[])


BIKES, COWS = Phrase(4, "white", "bicycle"), Phrase(3, "plastic", "cow")
OWL, MUG = Phrase(1, "", "owl"), Phrase(1, "red", "mug")


def test_the_published_example():
    """GenEval2's own: its text, atoms and questions. Mutation: another order, or a lost kind of
    question.
    """
    composition = Composition((BIKES, COWS), ("in front of",))
    assert composition.prompt == Prompt(
        "four white bicycles in front of three plastic cows",
        "atom_count_7",
        {
            "atom_count": 7,
            "vqa_list": [
                ["How many bicycles are in the image?", "four"],
                ["Are the bicycles white?", "Yes"],
                ["Are there any bicycles in the image?", "Yes"],
                ["Are the bicycles in front of the cows?", "Yes"],
                ["How many cows are in the image?", "three"],
                ["Are the cows plastic?", "Yes"],
                ["Are there any cows in the image?", "Yes"],
            ],
            "skills": ["count", "attribute", "object", "position", "count", "attribute", "object"],
        },
    )


def test_texts_say_who_is_where():
    """Mutation: chain two positions, which leaves open who the second one is about."""
    texts = {
        ("", ""): "an owl, a red mug and three plastic cows",
        ("", "under"): "an owl, and a red mug under three plastic cows",
        ("behind", ""): "an owl behind a red mug, and three plastic cows",
        ("behind", "under"): "an owl behind a red mug, with the mug under three plastic cows",
    }
    for relations, text in texts.items():
        assert Composition((OWL, MUG, COWS), relations).text == text
    single = Composition((MUG,), ())
    assert single.text == "a red mug" and single.num_atoms == 2
    assert single.prompt.metadata["vqa_list"][:2] == [
        ["How many mugs are in the image?", "one"],
        ["Is the mug red?", "Yes"],
    ]


def draw(count=400, seed=0, low=3, high=10, exclude=None, split="train"):
    return composition_prompts(
        split=split, count=count, seed=seed, min_atoms=low, max_atoms=high, exclude=exclude
    )


def test_prompts_have_the_atoms_asked_for_and_never_repeat():
    """3 to 10 in equal shares; each question answers to a word of the text. Mutation: miscount, or
    draw twice.
    """
    prompts = draw()
    assert len({prompt.text for prompt in prompts}) == 400
    counts = [prompt.metadata["atom_count"] for prompt in prompts]
    assert [counts.count(n) for n in range(3, 11)] == [50] * 8
    for prompt in prompts:
        data = prompt.metadata
        ones = [pair for pair in data["vqa_list"] if pair[1] == "one"]
        assert len(data["vqa_list"]) - len(ones) == data["atom_count"] and len(
            data["skills"]
        ) == len(data["vqa_list"])
        nouns = [pair[0].split()[2] for pair in data["vqa_list"] if pair[0].startswith("How many")]
        assert len(nouns) == len(set(nouns)) <= 3
    said = " ".join(prompt.text for prompt in prompts)
    assert all(word in said for word in (*MATERIALS, "seven", "to the left of", "on top of"))
    assert draw() == prompts != draw(seed=1)
    assert len(set(OBJECTS.values())) == len(OBJECTS) > 60


def test_no_overlap_with_a_test_file(tmp_path):
    """Neither the words nor the questions of a prompt, whatever its case and commas. Mutation:
    compare texts alone.
    """
    mine = draw(count=100)
    rows = [{"prompt": prompt.text.upper() + ".", **prompt.metadata} for prompt in mine[:50]]
    rows += [
        {"prompt": f"{i} in other words", **prompt.metadata} for i, prompt in enumerate(mine[50:])
    ]
    others = draw(count=100, exclude=write(tmp_path / "test.jsonl", *rows))
    assert not {prompt.text for prompt in others} & {prompt.text for prompt in mine}
    with pytest.raises(ValueError, match="exclude=none"):
        draw(exclude="none")


def test_the_splits_share_no_prompt():
    """Of two and three atoms there are so few that both splits nearly exhaust them; all are found
    in one or the other.

    Mutation: split by the seed, by the text with its order of objects, or by Python's own hash.
    """

    def marks(prompts):
        asked = {frozenset(map(tuple, prompt.metadata["vqa_list"])) for prompt in prompts}
        return {prompt.text.replace(",", "") for prompt in prompts}, asked

    train, test = draw(900, low=2, high=3), draw(200, seed=5, low=2, high=3, split="test")
    assert all(not ours & theirs for ours, theirs in zip(marks(train), marks(test), strict=True))
    nouns = {
        prompt.text.split()[-1]
        for split in ("train", "test")
        for prompt in draw(6, low=1, high=1, split=split)
    }
    assert len(nouns) == 12
    assert [prompt.text for prompt in draw(3, low=1, high=1, split="test")] == [
        "a tiger",
        "a bear",
        "a suitcase",
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "held_in"}, "prompts.split=held_in must be train or test"),
        ({"count": 0}, "prompts.count=0"),
        ({"low": 0}, "prompts.min_atoms=0"),
        ({"low": 5, "high": 4}, "min_atoms=5 must be at most prompts.max_atoms=4"),
        ({"high": 12}, "prompts.max_atoms=12 must be a whole number of at least 1 and at most 11"),
        ({"low": 1, "high": 1, "count": 90}, "only"),
    ],
)
def test_impossible_sets_are_refused(settings, words):
    """Mutation: search for ever."""
    with pytest.raises(ValueError, match=words):
        draw(**settings)
