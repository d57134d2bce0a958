"""Prompts of a data set, read from parquet files without a network; and what is told where it is
not to be had.
"""

import builtins
import math

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from runs import composed, make

from flowrl.errors import UserError
from flowrl.prompts.hub import hub_prompts
from flowrl.prompts.text import text_prompts
from flowrl.runs.provenance import prompts_digest
from flowrl.types import Prompt

ROWS = {
    "caption": ["a red circle", "two cafés"],
    "kind": ["one", "two/three"],
    "count": [1, 2],
    "vqa_list": [[["a circle?", "Yes"]], [["two?", "Yes"]]],
    "image": [b"\x00\xff", b"\x00\xfe"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The library's cache, one for each test."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place))


@pytest.fixture
def folder(tmp_path):
    """A data set as the hub lays it out, with two splits."""
    for split, rows in (("train", ROWS), ("test", {key: ROWS[key][:1] for key in ROWS})):
        place = tmp_path / "data"
        place.mkdir(exist_ok=True)
        pq.write_table(pa.table(rows), place / f"{split}-00000-of-00001.parquet")
    return tmp_path


def read(path, **changes):
    arguments = {
        "config": None,
        "split": "train",
        "column": "caption",
        "family": None,
        "metadata": [],
        "revision": None,
    }
    return hub_prompts(path=str(path), **arguments | changes)


def test_a_folder_and_a_file_give_prompts_with_their_metadata(folder):
    """In their order; other columns stay unread. Mutation: take all columns, or lose the family."""
    expected = [
        Prompt("a red circle", "one", {"count": 1, "vqa_list": ROWS["vqa_list"][0], "kind": "one"}),
        Prompt(
            "two cafés",
            "two_three",
            {"count": 2, "vqa_list": ROWS["vqa_list"][1], "kind": "two/three"},
        ),
    ]
    options = {"family": "kind", "metadata": ["count", "vqa_list"]}
    assert read(folder, **options) == expected
    assert read(folder / "data" / "train-00000-of-00001.parquet", **options) == expected
    assert read(folder, split="test") == [Prompt("a red circle")]
    assert read(folder, family="count")[1].family == "count_2"


def test_the_digest_of_prompts_tells_data_sets_apart(folder):
    """A resumed run compares it. Mutation: a digest of the path."""
    digests = {
        prompts_digest(read(folder)),
        prompts_digest(read(folder, split="test")),
        prompts_digest(read(folder, metadata=["count"])),
    }
    assert len(digests) == 3
    assert prompts_digest(read(folder)) == prompts_digest([Prompt(t) for t in ROWS["caption"]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "tran"}, r"split=tran is none of its splits \(did you mean 'train'\?\): train"),
        (
            {"column": "capton"},
            r"column=capton is none of its columns \(did you mean 'caption'\?\): caption, kind",
        ),
        ({"metadata": ["skills"]}, "metadata=skills is none of its columns: caption"),
        ({"family": "tag"}, "family=tag is none of its columns"),
        ({"column": "count"}, r"row 1: 'count': 1 is no prompt; give a text"),
        ({"metadata": ["image"]}, r"row 1: 'image' holds bytes, which is no JSON value"),
        ({"revision": "v1"}, r"revision=v1 is for a data set of the hub, and .* leave it null"),
        ({"config": "en"}, r"config=en is for a data set of the hub"),
    ],
)
def test_what_a_data_set_does_not_have_is_named(changes, words, folder):
    """Mutation: the library's own words, or a key error in the middle of reading."""
    with pytest.raises(UserError, match=words) as told:
        read(folder, **changes)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            {"caption": pa.array([], pa.string())},
            r"a\.parquet: it holds no row; give one with prompts",
        ),
        ({"caption": ["a", " "]}, r"row 2: 'caption': the prompt is empty"),
        ({"caption": ["a\0"]}, r"row 1: 'caption': the character \\u0000 cannot be part"),
        ({"caption": ["a", None]}, r"row 2: 'caption': None is no prompt"),
        ({"caption": ["a"], "x": [math.nan]}, r"row 1: 'x' holds float, which is no JSON value"),
    ],
)
def test_rows_that_are_no_prompts_are_told(rows, words, tmp_path):
    """Mutation: train on an empty prompt."""
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(rows), file)
    with pytest.raises(UserError, match=words):
        read(file, metadata=["x"] if "x" in rows else [])


def test_paths_that_lead_nowhere(tmp_path):
    """None of them asks the hub. Mutation: look for a missing file on the hub."""
    for path in (
        tmp_path / "none",
        "./none/x",
        "two",
        "none.parquet",
        "https://x.y/z",
        "a/b/c",
        "~/none",
    ):
        with pytest.raises(UserError, match="no such file or folder; give a data set's ORG/NAME"):
            read(path)
    with pytest.raises(UserError, match="no parquet file below this folder"):
        read(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read \(") as told:
        read(tmp_path / "a.parquet")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. You must be\nx"),
            "gated, and your token does not open it: accept its terms",
        ),
        (DatasetNotFoundError("Revision 'x' doesn't exist for dataset 'a/b'"), "no such revision"),
        (DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub"), "no such data set"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"), "not in the"),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['en', 'de']\nExample"),
            "it has several configurations; give one of 'en', 'de' as data.prompts.config",
        ),
        (RuntimeError("Dataset scripts are no\nlonger supported"), "cannot be read .*scripts are"),
    ],
)
def test_what_the_hub_answers_is_one_line(error, words, monkeypatch):
    """Mutation: tell every refusal as a missing data set."""

    def load_dataset(*, path, name, revision, split):
        assert (path, name, revision, split) == ("a/b", "en", "v1", "train")
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=f"^prompts path=a/b: .*{words}") as told:
        read("a/b", config="en", revision="v1")
    assert "\n" not in str(told.value)


def test_a_missing_package_is_told_with_the_extra(folder, monkeypatch):
    """Mutation: import it with the module, so that nothing works without it."""
    real = builtins.__import__

    def without(name, *arguments):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the package datasets; .*flowrl-lightning\[hub\]"):
        read(folder)


@pytest.mark.parametrize(
    ("version", "is_safe"), [("3.6.0", False), ("4.0.0", True), ("10.1", True)]
)
def test_a_library_that_runs_code_of_data_sets_is_refused(folder, monkeypatch, version, is_safe):
    """Before it reads one. Mutation: take whatever is installed."""
    monkeypatch.setattr(datasets, "__version__", version)
    if is_safe:
        assert len(read(folder)) == 2
        return
    monkeypatch.setattr(datasets, "load_dataset", None)
    expected = (
        r"datasets 3\.6\.0 runs code of data sets; run: pip install .*flowrl-lightning\[hub\]"
    )
    with pytest.raises(UserError, match=expected):
        read(folder)


def test_a_parquet_file_is_sent_here_by_the_other_readers(folder):
    """Mutation: tell users to write it anew."""
    with pytest.raises(UserError, match=r"a table \(parquet\); take data=hub for it, or save"):
        text_prompts(path=str(folder / "data" / "train-00000-of-00001.parquet"))


def test_training_and_evaluation_take_it(folder):
    """The evaluation another split, where told. Mutation: evaluate on shapes."""
    words = ["data=hub", f"data.prompts.path={folder}", "data.prompts.column=caption"]
    cfg = composed(*words, "evaluation.sets.held_in.split=test")
    assert cfg.evaluation.sets.held_in.column == "caption"
    _, data, evaluator = make(*words, "evaluation.sets.held_in.split=test")
    assert {prompt.text for prompt in data.prompts} == set(ROWS["caption"])
    assert [prompt.text for prompt in evaluator.sets["held_in"]] == ROWS["caption"][:1]
