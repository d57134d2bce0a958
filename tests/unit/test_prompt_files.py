"""Files of prompts as people have them: encodings, kinds, and what is no prompt, refused by file
and line.
"""

import json

import pytest

from flowrl.prompts.files import file_prompts, prompt_set
from flowrl.prompts.jsonl import jsonl_prompts
from flowrl.prompts.text import text_prompts

ROWS = '{"prompt": "a red circle", "tag": "one"}\n{"prompt": "two cafés", "tag": "two"}\n'


def texts(prompts):
    return [prompt.text for prompt in prompts]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-16-be with mark"]
)
def test_byte_order_marks(tmp_path, encoding):
    """They are no part of a prompt, nor of JSON, also in the middle of files put together.

    Mutation: read the mark into the first prompt, or UTF-16 as UTF-8.
    """
    name, _, is_marked = encoding.partition(" ")
    mark = "\ufeff" if is_marked else ""
    for kind, text in (("txt", "a red circle\n\ntwo cafés\n"), ("jsonl", ROWS)):
        (tmp_path / f"a.{kind}").write_bytes((mark + text).encode(name))
        assert texts(file_prompts(str(tmp_path / f"a.{kind}"))) == ["a red circle", "two cafés"]
    (tmp_path / "both.txt").write_bytes(b"\xef\xbb\xbfa red circle\n" * 2)
    assert texts(text_prompts(path=str(tmp_path / "both.txt"))) == ["a red circle"] * 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            "a cat\nun café\n".encode("cp1252"),
            r"bad\.txt line 2: not UTF-8 \(byte 0xe9\); save its prompts as UTF-8",
        ),
        ("a cat".encode("utf-16-le"), r"bad\.txt line 1: binary, or UTF-16 without its mark"),
        ("a cat".encode("utf-32"), r"bad\.txt line 1: binary"),
        (b"\xff\xfea", r"bad\.txt line 1: not UTF-16"),
        (
            b"PAR1\x15\x04\x15\xff",
            r"bad\.txt: a table \(parquet\); take data=hub for it, or save its prompts as UTF-8",
        ),
        (b"PK\x03\x04\x14\0\0\0\xff", r"bad\.txt line 1: binary"),
        (b"\n \n\t\n", "holds no prompt"),
        (b"\xef\xbb\xbf", "holds no prompt"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, data, words):
    """Mutation: the codec's bare words, or a prompt of odd bytes."""
    (tmp_path / "bad.txt").write_bytes(data)
    for read in (file_prompts, lambda path: text_prompts(path=path), prompt_set):
        with pytest.raises(ValueError, match=words):
            read(str(tmp_path / "bad.txt"))
    with pytest.raises(ValueError, match=words):
        jsonl_prompts(path=str(tmp_path / "bad.txt"), text="prompt", family=None, required=[])


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.parquet"])
def test_tables_are_refused_by_name(tmp_path, name):
    """Mutation: draw a table's head and its commas as prompts."""
    (tmp_path / name).write_text("prompt,n\na cat,1\n")
    with pytest.raises(ValueError, match=rf"{name}: a table"):
        file_prompts(str(tmp_path / name))


def test_lines_end_where_files_end_them(tmp_path):
    """Three kinds of line ends; a line separator within a prompt or a JSON text is a character as
    any other.

    Mutation: str.splitlines, which cuts there.
    """
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\rthree\u2028four\x85\nfive".encode())
    assert texts(text_prompts(path=str(tmp_path / "a.txt"))) == [
        "one",
        "two",
        "three\u2028four",
        "five",
    ]
    (tmp_path / "a.jsonl").write_text('{"prompt": "three\u2028four"}\n', encoding="utf-8")
    assert texts(file_prompts(str(tmp_path / "a.jsonl"))) == ["three\u2028four"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.txt", "a.json", "a"])
def test_json_objects_are_recognised_by_name_or_by_lines(tmp_path, name):
    """Mutation: go by one spelling of one ending, and draw pictures of JSON."""
    path = tmp_path / name
    path.write_text(ROWS, encoding="utf-8")
    assert [(prompt.text, prompt.family) for prompt in file_prompts(str(path))] == [
        ("a red circle", "one"),
        ("two cafés", "two"),
    ]
    assert prompt_set(str(path)) == {
        "_target_": "flowrl.prompts.jsonl.jsonl_prompts",
        "path": str(path),
        "text": "prompt",
        "family": "tag",
        "required": [],
    }
    with pytest.raises(ValueError, match=r"a file of JSON objects; take data=jsonl"):
        text_prompts(path=str(path))


def test_braces_alone_make_no_json(tmp_path):
    """Mutation: take a template's braces for an object."""
    (tmp_path / "a.txt").write_text('{a cat}\n{"prompt": "a dog"}\n')
    assert texts(file_prompts(str(tmp_path / "a.txt"))) == ["{a cat}", '{"prompt": "a dog"}']


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"prompt": null}', "'prompt': None is no prompt"),
        ('{"prompt": ["a"]}', r"'prompt': \['a'\] is no prompt"),
        ('{"prompt": 7}', "'prompt': 7 is no prompt"),
        ('{"prompt": ""}', "'prompt': the prompt is empty"),
        ('{"prompt": "  "}', "'prompt': the prompt is empty"),
        ('{"prompt": "a \\ud800 b"}', r"the character \\ud800 cannot be part"),
        ('{"prompt": "a\\u0000b"}', r"the character \\u0000 cannot be part"),
        ('{"prompt": "a", "vqa_list": [["\\udfff?", "Yes"]]}', r"the character \\udfff"),
        ('{"prompt": "a", "vqa_list": null}', "'vqa_list' must be a list of pairs"),
        ('{"prompt": "a", "vqa_list": [["a?"]]}', "'vqa_list' must be a list of pairs"),
        ('{"prompt": "a", "vqa_list": [["a?", 2]]}', "'vqa_list' must be a list of pairs"),
        ('{"prompt": "a", "vqa_list": [], "skills": null}', "'skills' must be a list of texts"),
        ('{"prompt": "a", "tag": null}', "'tag': None is no task family"),
        ('{"prompt": "a", "tag": ["x"]}', r"'tag': \['x'\] is no task family"),
        (
            '{"prompt": "a", "score": NaN}',
            "not JSON .NaN is no JSON number.; a line must be one whole object",
        ),
        ('{"prompt": "a"', "not JSON .*; a line must be one whole object"),
        ("[" * 100_000, "not JSON"),
        ('["a cat"]', "a JSON object was expected, not list"),
    ],
)
def test_a_prompt_is_a_text(tmp_path, row, words):
    """Mutation: str() of whatever stands there, or a failure in the middle of training."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "fine", "tag": "x"}) + f"\n\n{row}\n")
    family = "tag" if "tag" in row else None
    with pytest.raises(ValueError, match=rf"^prompts .*a\.jsonl line 3: .*{words}"):
        jsonl_prompts(path=str(path), text="prompt", family=family, required=[])


def test_a_family_that_only_some_lines_have(tmp_path):
    """Is missed where it lacks, whichever line comes first. Mutation: go by the first line, and
    lose all families.
    """
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "tag": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 1: no 'tag'; it has 'prompt'"):
        file_prompts(str(tmp_path / "a.jsonl"))
