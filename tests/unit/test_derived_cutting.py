"""Calls of tokenizers that cut texts are noted, and tokenizers are left as they were."""

from types import SimpleNamespace

from families import words

from flowrl.models.derived.cutting import Cut, watching


def test_calls_that_cut_are_noted():
    """With the limit of the call, else the tokenizer's own; also inside a processor.

    Mutations: note calls that leave texts whole, forget the tokenizer's own limit, or leave its
    class.
    """
    letters = words.clip_tokenizer()
    inner = words.t5_tokenizer()
    parts = {"tokenizer": letters, "processor": SimpleNamespace(tokenizer=inner), "vae": None}
    kinds = (type(letters), type(inner))
    with watching(SimpleNamespace(components=parts)) as cuts:
        plain = letters(["a cat", "a dog"], truncation=True, max_length=5)
        letters("a fox", padding="max_length", truncation=True)
        letters("whole")
        inner(text="a crow", truncation="longest_first", max_length=4)
    assert cuts == [
        Cut("tokenizer", "a cat", 5),
        Cut("tokenizer", "a dog", 5),
        Cut("tokenizer", "a fox", words.NUM_CLIP_TOKENS),
        Cut("processor", "a crow", 4),
    ]
    assert (type(letters), type(inner)) == kinds
    assert plain.input_ids == letters(["a cat", "a dog"], truncation=True, max_length=5).input_ids
    assert len(cuts) == 4
