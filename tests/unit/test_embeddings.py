"""Prompt embeddings in memory and in a folder: the same rows, computed once, whole or not there."""

import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flowrl.models.conditioning import join
from flowrl.models.embeddings import Folder, PromptEmbeddings
from flowrl.parallel import launcher
from flowrl.types import Conditioning, Prompt


class Encoder:
    """Embeds a text by its length and first letter, of at most 8 letters; counts what it is asked
    for.
    """

    def __init__(self, negative=None, key="model"):
        self.negative_prompt, self.embedding_key = negative, key
        self.seen, self.sizes, self.dropped = [], [], 0

    def encode_prompts(self, texts):
        self.seen += texts
        self.sizes.append(len(texts))
        rows = torch.tensor([[float(len(text)), float(ord((text + " ")[0]))] for text in texts])
        return Conditioning({"tokens": rows[:, None].repeat(1, 3, 1), "pooled": rows})

    def truncated_part(self, text):
        return repr(text[8:]) if len(text) > 8 else ""

    def drop_text_encoders(self):
        self.dropped += 1


def embed(model, texts, folder=None, chunk=2, **options):
    prompts = [Prompt(text) for text in texts]
    return PromptEmbeddings(model, prompts, folder=folder and str(folder), chunk=chunk, **options)


TEXTS = ["a cat", "two dogs", "bird", "an elephant", "cats"]
ASKED = [Prompt("bird"), Prompt("a cat"), Prompt("bird")]


@pytest.mark.parametrize("negative", [None, ""])
def test_memory_and_folder_give_the_same_rows(negative, tmp_path):
    """Rows by text, in the order asked for, with one negative beside each. Mutation: index rows by
    position.
    """
    for folder in (None, tmp_path):
        rows = embed(Encoder(negative), TEXTS, folder)(ASKED)
        assert rows.tensors["pooled"].tolist() == [[4, ord("b")], [5, ord("a")], [4, ord("b")]]
        assert torch.equal(rows.tensors["tokens"], rows.tensors["pooled"][:, None].repeat(1, 3, 1))
        assert (rows.negative is None) == (negative is None)
        if negative is not None:
            assert rows.negative.tensors["pooled"].tolist() == [
                [0, 32]
            ] * 3 and rows.negative.tensors["tokens"].shape == (3, 3, 2)


class Speller(Encoder):
    """Embeds a text by its letters, as many as there are, with no pooled embedding."""

    def encode_prompts(self, texts):
        self.seen += texts
        return join(
            [{"letters": torch.tensor([*text.encode()], dtype=torch.int64)} for text in texts]
        )


def test_rows_of_different_lengths_are_padded_for_those_that_are_asked_for(tmp_path, monkeypatch):
    """In memory and in a folder alike, bitwise; a prompt alone has its own length, whatever the
    others are. The mean of the first two, 13 / 2 letters of 8 bytes, stands for four: 208.

    Mutation: pad to the longest of all, count the first row alone, or store the padding.
    """
    for folder in (None, tmp_path):
        embeddings = embed(Speller(""), TEXTS[:3], folder)
        rows = embeddings([Prompt("bird"), Prompt("a cat")])
        assert rows.tensors["letters"].tolist() == [[*b"bird", 0], [*b"a cat"]]
        assert rows.tensors["letters.shape"].tolist() == [[4], [5]]
        assert rows.negative.tensors["letters"].shape == (2, 0)
        alone = embeddings([Prompt("bird")] * 2)
        assert alone.tensors.keys() == {"letters"} and len(alone) == 2
    assert load_file(embeddings.store.path("bird")).keys() == {"letters"}
    sizes = Speller().encode_prompts(["a cat", "two dogs"])
    monkeypatch.setattr(shutil, "disk_usage", full(207))
    with pytest.raises(ValueError, match="embeddings of 4 prompts need"):
        embeddings.store.expect(sizes, 4)
    monkeypatch.setattr(shutil, "disk_usage", full(208))
    embeddings.store.expect(sizes, 4)


@pytest.mark.parametrize("negative", [None, ""])
def test_a_prompt_is_held_once_however_often_it_is_asked_for(negative, tmp_path):
    """One row a prompt, and the same tensors for the next micro-batch of a group; not for
    another's.

    Mutation: a row for each sample, or the last group's rows for the next one.
    """
    for folder in (None, tmp_path):
        embeddings = embed(Encoder(negative), TEXTS, folder)
        rows, numbers = embeddings.shared(ASKED)
        assert rows.tensors["pooled"].tolist() == [
            [4, ord("b")],
            [5, ord("a")],
        ] and numbers.tolist() == [
            0,
            1,
            0,
        ]
        again, later = embeddings.shared([ASKED[0], *ASKED])
        assert again.tensors["tokens"] is rows.tensors["tokens"] and later.tolist() == [0, 0, 1, 0]
        other, _ = embeddings.shared([Prompt("cats")])
        assert other.tensors["pooled"].tolist() == [[4, ord("c")]]
        assert embeddings.shared(ASKED[1:])[0].tensors["pooled"].tolist() == [
            [5, ord("a")],
            [4, ord("b")],
        ]


@pytest.mark.parametrize("is_kept_in_folder", [True, False])
def test_the_negative_prompt_is_read_once(is_kept_in_folder, tmp_path, monkeypatch):
    """Not for each group, whose rows refer to the same numbers; anew after a move to a device.

    Mutation: ask the store for every group, or keep the negative of the device before.
    """
    embeddings = embed(Encoder("ugly"), TEXTS, tmp_path if is_kept_in_folder else None)
    read = embeddings.store.rows
    asked = []

    def rows(texts):
        asked.append(list(texts))
        return read(texts)

    monkeypatch.setattr(embeddings.store, "rows", rows)
    negatives = [embeddings([Prompt(text)] * 2).negative for text in ("cats", "bird", "cats")]
    assert asked.count(["ugly"]) == 1
    assert all(negative.tensors["pooled"].tolist() == [[4, ord("u")]] * 2 for negative in negatives)
    embeddings.to(torch.device("cpu"))
    embeddings([Prompt("cats")])
    assert asked.count(["ugly"]) == 2


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
    """Revision, dtype and sequence length are part of the key. Mutation: key files by prompt
    alone.
    """
    embed(Encoder(), TEXTS, tmp_path)
    other = Encoder(key=key)
    embed(other, TEXTS, tmp_path)
    assert set(other.seen) == set(TEXTS)


def test_damaged_files_are_computed_anew(tmp_path, caplog):
    """A truncated file and one that holds another prompt. Mutation: trust whatever bears the
    name.
    """
    embeddings = embed(Encoder(), TEXTS, tmp_path)
    cut, swapped = (embeddings.store.path(text) for text in ("bird", "cats"))
    cut.write_bytes(cut.read_bytes()[:-5])
    swapped.write_bytes(embeddings.store.path("a cat").read_bytes())
    again = Encoder()
    rows = embed(again, TEXTS, tmp_path, chunk=1)([Prompt("bird"), Prompt("cats")])
    assert set(again.seen) == {"bird", "cats"} and rows.tensors["pooled"][:, 0].tolist() == [4, 4]
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


def full(free):
    """A disk with so many bytes left, as shutil tells it."""
    return lambda path: SimpleNamespace(free=free)


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path, monkeypatch):
    """A row is 3 x 2 and 2 numbers of 4 bytes: 32. Of five texts two are there, so 96 bytes are
    enough, 95 are not.

    Mutation: count all prompts, the tokens alone, or write first and look later.
    """
    embed(Encoder(), TEXTS[:2], tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", full(95))
    with pytest.raises(
        ValueError, match=r"embeddings\.folder=.* 3 prompts need .*embeddings\.folder=null"
    ) as error:
        embed(Encoder(), TEXTS, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    embed(Encoder(), TEXTS[:2], tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", full(96))
    embed(Encoder(), TEXTS, tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5


@pytest.mark.parametrize(
    ("count", "free", "told"),
    [
        (25_000, 2**39, "293.0 GiB (512.0 GiB free)"),
        (85, 2**39, ""),
        (25_000, 2**38, "256.0 GiB free"),
    ],
)
def test_what_goes_to_the_disk_is_told_where_it_is_much(
    count, free, told, tmp_path, monkeypatch, capsys
):
    """FLUX.2-klein-9B: 512 tokens of 12288 bfloat16 numbers are 12.6 MB, 25,000 of them 293 GiB; 85
    less than one GiB.

    Mutation: fill a disk in silence, tell of every small run, or swap what is needed and what is
    free.
    """
    tokens = torch.zeros(1, dtype=torch.bfloat16).expand(8, 512, 12288)
    rows = Conditioning({"tokens": tokens, "pooled": torch.zeros(8, 0)})
    monkeypatch.setattr(shutil, "disk_usage", full(free))
    folder = Folder(tmp_path, "model")
    if free < 2**39:
        with pytest.raises(
            ValueError, match=f"{told}, but the embeddings of 25000 prompts need 293.0 GiB"
        ):
            folder.expect(rows, count)
    else:
        folder.expect(rows, count)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 if "(" in told else 0) and all(told in line for line in lines)


def test_a_write_that_fails_leaves_nothing_and_names_the_folder(tmp_path):
    """As when a quota is reached. Mutation: let the library's error through, or keep the partial
    file.
    """
    embeddings = embed(Encoder(), TEXTS[:1], tmp_path)
    embeddings.store.path("bird").mkdir()  # which a file cannot replace
    with pytest.raises(ValueError, match=r"embeddings\.folder=.* cannot be written to \("):
        embed(Encoder(), ["bird"], tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_what_killed_writers_left_is_swept(tmp_path):
    """Files of a day ago, of this model; a younger one may belong to another process. Mutation:
    sweep all, or none.
    """
    folder = embed(Encoder(), TEXTS[:1], tmp_path).store.folder
    names = {"old.partial": 25, "young.partial": 23, "old.safetensors": 25}
    for name, hours in names.items():
        (folder / name).touch()
        os.utime(folder / name, (time.time() - 3600 * hours,) * 2)
    embed(Encoder(), TEXTS[:1], tmp_path)
    assert [name for name in names if (folder / name).exists()] == [
        "young.partial",
        "old.safetensors",
    ]


def warnings_of(caplog, *given, **how):
    caplog.clear()
    embed(*given, **how)
    return [record.getMessage() for record in caplog.records]


def test_prompts_that_are_cut_are_warned_of_once_by_every_run(tmp_path, caplog, monkeypatch):
    """The first of two, with what it loses, also from a full or a half-full folder; by one process
    of several.

    Mutation: forget it with the encoders, warn of each prompt, or take the part of another one.
    """
    texts = [*TEXTS, "an elephant"]
    expected = [
        "prompts longer than the model takes, which are cut: 1 of 5; the first is 'an elephant': "
        "it loses 'ant'"
    ]
    assert warnings_of(caplog, Encoder(), texts) == expected
    assert warnings_of(caplog, Encoder(), texts, tmp_path) == expected
    warm = Encoder()
    assert warnings_of(caplog, warm, texts, tmp_path) == expected and not warm.seen
    both = warnings_of(caplog, Encoder(), [*texts, "zebras, zebras"], tmp_path)
    assert (
        len(both) == 1
        and ": 2 of 6;" in both[0]
        and both[0].endswith("'an elephant': it loses 'ant'")
    )
    assert warnings_of(caplog, Encoder(), ["a cat"], tmp_path) == []
    monkeypatch.setenv("RANK", "1")
    assert warnings_of(caplog, Encoder(), texts, tmp_path) == []


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_processes_begin_elsewhere_and_share_the_work(variable, tmp_path, monkeypatch):
    """Whoever started them: torchrun, a sweep or srun. Mutation: let every process encode
    everything in one order, or ask torchrun's variable alone.
    """
    firsts = []
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        model = Encoder()
        embed(model, [*TEXTS, "zebra"], tmp_path / rank, num_processes=2)
        firsts.append(model.seen[0])
    assert firsts == ["a cat", "bird"]


def test_chunks_have_a_size():
    """Mutation: accept 0."""
    with pytest.raises(ValueError, match=r"embeddings\.chunk=0"):
        embed(Encoder(), TEXTS, chunk=0)


@pytest.mark.parametrize(
    ("variables", "numbers"),
    [
        ({}, (0, 0)),
        ({"RANK": "9", "LOCAL_RANK": "1"}, (9, 1)),
        ({"LOCAL_RANK": "3"}, (3, 3)),
        ({"SLURM_PROCID": "5", "SLURM_LOCALID": "2"}, (5, 2)),
    ],
)
def test_a_process_knows_its_place_whoever_started_it(variables, numbers, monkeypatch):
    """torchrun, Lightning or a sweep, srun. Mutation: take a machine's number for the run's."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (launcher.rank(), launcher.local_rank()) == numbers
