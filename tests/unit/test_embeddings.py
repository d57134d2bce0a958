"""Prompt embeddings in memory and in a folder: the same rows, computed once, whole or not there."""

import threading

import pytest
import torch
from safetensors.torch import load_file

from flowrl.models.embeddings import PromptEmbeddings
from flowrl.types import Conditioning, Prompt


class Encoder:
    """Embeds a text by its length and first letter; counts what it is asked for."""

    def __init__(self, negative=None, key="model"):
        self.negative_prompt, self.embedding_key = negative, key
        self.seen, self.sizes, self.dropped = [], [], 0

    def encode_prompts(self, texts):
        self.seen += texts
        self.sizes.append(len(texts))
        rows = torch.tensor([[float(len(text)), float(ord((text + " ")[0]))] for text in texts])
        return Conditioning(rows[:, None].repeat(1, 3, 1), rows)

    def drop_text_encoders(self):
        self.dropped += 1


def embed(model, texts, folder=None, chunk=2):
    return PromptEmbeddings(model, [Prompt(text) for text in texts], folder=folder and str(folder), chunk=chunk)


TEXTS = ["a cat", "two dogs", "bird", "an elephant", "cats"]
ASKED = [Prompt("bird"), Prompt("a cat"), Prompt("bird")]


@pytest.mark.parametrize("negative", [None, ""])
def test_memory_and_folder_give_the_same_rows(negative, tmp_path):
    """Rows by text, in the order asked for, with one negative beside each. Mutation: index rows by position."""
    for folder in (None, tmp_path):
        rows = embed(Encoder(negative), TEXTS, folder)(ASKED)
        assert rows.pooled.tolist() == [[4, ord("b")], [5, ord("a")], [4, ord("b")]]
        assert torch.equal(rows.tokens, rows.pooled[:, None].repeat(1, 3, 1))
        assert (rows.negative is None) == (negative is None)
        if negative is not None:
            assert rows.negative.pooled.tolist() == [[0, 32]] * 3 and rows.negative.tokens.shape == (3, 3, 2)


@pytest.mark.parametrize("negative", [None, ""])
def test_a_prompt_is_held_once_however_often_it_is_asked_for(negative, tmp_path):
    """One row a prompt, and the same tensors for the next micro-batch of a group; not for another's.

    Mutation: a row for each sample, or the last group's rows for the next one.
    """
    for folder in (None, tmp_path):
        embeddings = embed(Encoder(negative), TEXTS, folder)
        rows, numbers = embeddings.shared(ASKED)
        assert rows.pooled.tolist() == [[4, ord("b")], [5, ord("a")]] and numbers.tolist() == [0, 1, 0]
        again, later = embeddings.shared([ASKED[0], *ASKED])
        assert again.tokens is rows.tokens and later.tolist() == [0, 0, 1, 0]
        other, _ = embeddings.shared([Prompt("cats")])
        assert other.pooled.tolist() == [[4, ord("c")]]
        assert embeddings.shared(ASKED[1:])[0].pooled.tolist() == [[5, ord("a")], [4, ord("b")]]


def test_a_folder_is_filled_once(tmp_path):
    """Mutation: encode what is there already, or load encoders for nothing."""
    first, second = Encoder(), Encoder()
    embed(first, TEXTS, tmp_path)
    embed(second, TEXTS[:3], tmp_path)
    assert sorted(set(first.seen)) == sorted(TEXTS) and second.seen == []
    assert first.dropped == second.dropped == 1
    assert set(first.sizes) == {2}, "chunks of one size, whatever is left"


@pytest.mark.parametrize("key", ["other", "model 512"])
def test_another_model_has_rows_of_its_own(key, tmp_path):
    """Revision, dtype and sequence length are part of the key. Mutation: key files by prompt alone."""
    embed(Encoder(), TEXTS, tmp_path)
    other = Encoder(key=key)
    embed(other, TEXTS, tmp_path)
    assert set(other.seen) == set(TEXTS)


def test_damaged_files_are_computed_anew(tmp_path, caplog):
    """A truncated file and one that holds another prompt. Mutation: trust whatever bears the name."""
    embeddings = embed(Encoder(), TEXTS, tmp_path)
    cut, swapped = (embeddings.store.path(text) for text in ("bird", "cats"))
    cut.write_bytes(cut.read_bytes()[:-5])
    swapped.write_bytes(embeddings.store.path("a cat").read_bytes())
    again = Encoder()
    rows = embed(again, TEXTS, tmp_path, chunk=1)([Prompt("bird"), Prompt("cats")])
    assert set(again.seen) == {"bird", "cats"} and rows.pooled[:, 0].tolist() == [4, 4]
    assert "damaged" in caplog.text and str(cut) in caplog.text
    assert load_file(cut)["pooled"].tolist() == [4, ord("b")]


def test_concurrent_writers_leave_whole_files_only(tmp_path):
    """Mutation: write under the final name, or under one temporary name for all writers."""
    texts = [f"{i} cats" for i in range(40)]
    threads = [threading.Thread(target=embed, args=(Encoder(), texts, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 40 and {path.suffix for path in files} == {".safetensors"}
    late = Encoder()
    embed(late, texts, tmp_path)
    assert late.seen == []


def test_processes_begin_elsewhere_and_share_the_work(tmp_path, monkeypatch):
    """Mutation: let every process encode everything in one order."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    firsts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        model = Encoder()
        embed(model, [*TEXTS, "zebra"], tmp_path / rank)
        firsts.append(model.seen[0])
    assert firsts == ["a cat", "bird"]


def test_chunks_have_a_size():
    """Mutation: accept 0."""
    with pytest.raises(ValueError, match=r"embeddings\.chunk=0"):
        embed(Encoder(), TEXTS, chunk=0)
