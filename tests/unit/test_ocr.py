import pytest
import torch

from flowrl.rewards.images import to_tensor
from flowrl.rewards.ocr import OCR, edit_distance, plain, target_of
from flowrl.rewards.specimens import misspell, sign
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt

pytest.importorskip("rapidocr")
WORDS = (
    "HELLO",
    "Coffee",
    "Open 24 hours",
    "EXIT",
    "Library",
    "Fresh bread",
    "NO PARKING",
    "Museum",
    "Welcome home",
    "Platform 9",
    "SALE",
    "Bookshop",
    "Happy birthday",
    "Danger",
    "Keep left",
    "Garden",
    "TAXI",
    "Station",
    "Bakery",
    "Good morning",
)


def wanting(text):
    return Prompt(f'a sign that says "{text}"')


@pytest.fixture(scope="module")
def ocr():
    return OCR(allows_more_text=True, min_confidence=0.5, side=320)


def test_rendered_words_are_read(ocr):
    """Above 95 %, as published for such OCR. Mutation: upside-down images, or spaces on one side
    only.
    """
    output = ocr([sign(word) for word in WORDS], [wanting(word) for word in WORDS])
    assert output.values.mean() > 0.95, [each["read"] for each in output.info]
    assert output.parts["exact"].mean() > 0.9


def test_misspellings_are_ordered_by_edit_distance(ocr):
    """1 - d/n of a 12-letter text with 0, 1, 3 and 6 letters wrong. Mutation: exact match, or d
    instead of d/n.
    """
    pictures = [
        sign(misspell("Happybirthday", count) if count else "Happybirthday")
        for count in (0, 1, 3, 6)
    ]
    values = ocr(pictures, [wanting("Happybirthday")] * 4).values
    assert (
        values.tolist() == sorted(values.tolist(), reverse=True) and len(set(values.tolist())) == 4
    )
    assert values[0] == 1
    torch.testing.assert_close(values, 1 - torch.tensor([0.0, 1, 3, 6]) / 13, atol=0.08, rtol=0)


def test_nothing_to_read_is_zero_and_nothing_wanted_is_no_value(ocr):
    """Mutation: fall back to the whole prompt, raise without quotes, or score 0."""
    output = RewardModule(reward=ocr, max_missing=0.0).score(
        [sign(" "), sign("EXIT")], [wanting("EXIT"), Prompt("a cat")]
    )
    assert output.values[0] == 0 and output.values[1].isnan()
    assert output.is_valid.all() and output.has_value.tolist() == [True, False]


def test_more_text_counts_or_does_not():
    """\"EXIT EXIT\" for \"EXIT\". Mutation: ignore the option."""
    picture, prompt = sign("EXIT EXIT"), wanting("EXIT")
    lenient, strict = (
        OCR(allows_more_text=allows, min_confidence=0.5, side=320) for allows in (True, False)
    )
    assert lenient([picture], [prompt]).values == 1
    assert strict([picture], [prompt]).values == 0


def test_tensors_give_the_same_number(ocr):
    """Mutation: RGB for one and BGR for the other."""
    pictures = [sign("Museum"), sign("Garden")]
    prompts = [wanting("Museum"), wanting("Gardener")]
    assert torch.equal(ocr(pictures, prompts).values, ocr(to_tensor(pictures), prompts).values)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        (Prompt('the words "Two Parts" and "more" on a wall'), "Two Parts more"),
        (Prompt("curly \u201cquotes\u201d count"), "quotes"),
        (Prompt("it's John's"), ""),
        (Prompt('"from the prompt"', metadata={"target": "from metadata"}), "from metadata"),
        (Prompt('"from the prompt"', metadata={"target": None}), "from the prompt"),
    ],
)
def test_the_wanted_text(prompt, target):
    """Mutation: take apostrophes for quotes, the first piece only, or the prompt before the
    metadata.
    """
    assert target_of(prompt) == target


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(a, b, distance):
    """Textbook values, both ways. Mutation: forget a kind of edit."""
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_plain_text():
    """Mutation: keep spaces, or case."""
    assert plain(" Open 24\nHours ") == "open24hours"
