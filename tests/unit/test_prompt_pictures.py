"""Pictures that come with prompts: found from the file of prompts, known by their content."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.errors import UserError
from flowrl.images.pictures import read_upright
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.pictured import check_config, check_use
from flowrl.prompts.files import file_prompts, prompt_set
from flowrl.prompts.jsonl import jsonl_prompts
from flowrl.prompts.pictures import sources_of
from flowrl.prompts.subsets import same_texts
from flowrl.runs.provenance import prompts_digest
from flowrl.types import Conditioning, PictureFile, Prompt


def save(path, colour, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """A file of prompts in a folder of its own, read from elsewhere."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "data" / "pictures" / "a.png", (200, 10, 10))
    save(tmp_path / "data" / "b.png", (10, 10, 200))
    save(tmp_path / "data" / "kept.png", (255, 255, 255))

    def write(*rows):
        path = tmp_path / "data" / "edits.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": "make it blue"} | row) for row in rows))
        return str(path)

    return write


def read(path, **options):
    options = {"text": "prompt", "family": None, "required": [], "image": "image"} | options
    return jsonl_prompts(path=path, **options)


def test_paths_go_from_the_files_folder(lines):
    """And what names pictures is no metadata. Mutation: go from the folder of the launch."""
    first, second, third = read(
        lines({"image": "pictures/a.png", "mask": "kept.png", "tag": 1}, {"image": "b.png"}, {})
    )
    assert read_upright(Path(first.image.path)).getpixel((0, 0)) == (200, 10, 10)
    assert read_upright(Path(first.mask.path)).getpixel((0, 0)) == (255, 255, 255)
    assert first.metadata == {"tag": 1} and second.mask is None
    assert third == Prompt("make it blue")
    assert [source.getpixel((0, 0)) for source in sources_of([second])] == [(10, 10, 200)]
    assert sources_of([first, third]) == []


def test_another_key_may_name_the_picture_and_null_none(lines):
    """Mutation: take `image` whatever is configured."""
    path = lines({"source": "b.png", "image": 7})
    assert read(path, image="source")[0].image is not None
    (prompt,) = read(path, image=None)
    assert prompt.image is None and prompt.metadata == {"source": "b.png", "image": 7}
    both = lines({"image": None}, {"image": "b.png"})
    assert file_prompts(both)[1].image is not None
    assert prompt_set(both)["image"] == "image" and "image" not in prompt_set(lines({}))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "gone.png"}, r"line 1: 'image': .*gone.png: No such file"),
        ({"image": "edits.jsonl"}, r"line 1: 'image': .*cannot be read as a picture"),
        ({"image": "cut.png"}, r"line 1: 'image': .*cannot be read as a picture"),
        ({"image": 7}, "line 1: 'image': 7 is no path"),
        ({"image": ""}, "line 1: 'image': '' is no path"),
        ({"image": "b.png", "mask": "gone.png"}, r"'mask': .*gone.png: No such file"),
        ({"image": "b.png", "mask": "wide.png"}, "'mask' is 9 x 4 pixels and 'image' 6 x 4"),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(lines, tmp_path, row, words):
    """A cut file too, whose header is whole. Mutation: read headers alone."""
    save(tmp_path / "data" / "wide.png", (0, 0, 0), (9, 4))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "data" / "whole.png")
    content = (tmp_path / "data" / "whole.png").read_bytes()
    (tmp_path / "data" / "cut.png").write_bytes(content[:6000])
    with pytest.raises(UserError, match=words) as error:
        read(lines(row))
    assert "\n" not in str(error.value)


def test_a_picture_is_known_by_its_content(lines, tmp_path):
    """A copy elsewhere is the same; another picture under the same name is not.

    Mutation: the path for the digest.
    """
    path = lines({"image": "b.png"})
    (before,) = read(path)
    (tmp_path / "moved").mkdir()
    shutil.copy(tmp_path / "data" / "b.png", tmp_path / "moved")
    shutil.copy(path, tmp_path / "moved")
    (moved,) = read(str(tmp_path / "moved" / "edits.jsonl"))
    assert moved.image.path != before.image.path
    assert moved == before and moved.key == before.key
    assert prompts_digest([moved]) == prompts_digest([before])
    save(tmp_path / "data" / "b.png", (1, 2, 3), (7, 5))
    (after,) = read(path)
    assert after.key != before.key and after != before
    assert prompts_digest([after]) != prompts_digest([before])
    assert same_texts([before, after, moved, Prompt(before.text)]).tolist() == [0, 1, 0, 2]


def test_a_mask_is_a_part_of_the_prompts_and_not_of_what_is_drawn(lines):
    """Mutation: leave the mask out of the digest, or put it into the key."""
    plain, masked = read(lines({"image": "b.png"}, {"image": "b.png", "mask": "kept.png"}))
    assert plain.key == masked.key
    assert prompts_digest([plain]) != prompts_digest([masked])


def test_a_photograph_is_turned_as_it_was_held(tmp_path):
    """Mutation: take the pixels as they lie in the file."""
    picture = Image.new("RGB", (8, 4))
    notes = picture.getexif()
    notes[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "a.jpg", exif=notes)
    assert read_upright(tmp_path / "a.jpg").size == (4, 8)


class Editor:
    """Embeds a text's length and a picture's colour."""

    negative_prompt = None
    embedding_key = "editor"
    use = "always"

    def __init__(self):
        self.asked = []

    def encode_prompts(self, prompts):
        raise AssertionError("its prompts carry pictures")

    def encode_edits(self, prompts, pictures):
        self.asked += prompts
        colours = [picture.getpixel((0, 0))[0] for picture in pictures]
        rows = [[len(text), colour] for text, colour in zip(prompts, colours, strict=True)]
        return Conditioning({"tokens": torch.tensor(rows, dtype=torch.float32)})

    def truncated_part(self, prompt):
        return ""

    def drop_text_encoders(self):
        pass


class Painter(Editor):
    """Takes no pictures."""

    encode_edits = None

    def __getattribute__(self, name):
        if name == "encode_edits":
            raise AttributeError(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("is_kept", [False, True])
def test_rows_belong_to_text_and_picture(lines, tmp_path, is_kept):
    """One text with two pictures is two rows, and rows on the disk are found again by content.

    Mutation: look rows up by the text.
    """
    prompts = read(lines({"image": "pictures/a.png"}, {"image": "b.png"}))
    folder = str(tmp_path / "rows") if is_kept else None
    model = Editor()
    embed = PromptEmbeddings(model, prompts, folder=folder, chunk=1)
    assert embed(prompts).tensors["tokens"].tolist() == [[12, 200], [12, 10]]
    assert len(model.asked) == 2
    if is_kept:
        save(tmp_path / "data" / "b.png", (99, 0, 0), (3, 3))
        again = Editor()
        changed = read(lines({"image": "pictures/a.png"}, {"image": "b.png"}))
        embed = PromptEmbeddings(again, changed, folder=folder, chunk=1)
        assert embed(changed).tensors["tokens"].tolist() == [[12, 200], [12, 99]]
        assert len(again.asked) == 1


def test_a_model_without_an_eye_for_pictures_takes_none(lines):
    """And one that needs them no other prompts. Mutation: embed the text alone."""
    prompts = read(lines({"image": "b.png"}))
    with pytest.raises(UserError, match="carry no picture, such as 'words', but a Editor"):
        PromptEmbeddings(Editor(), [Prompt("words")], folder=None, chunk=1)
    with pytest.raises(UserError, match="carry pictures, such as 'make it blue', but a Painter"):
        PromptEmbeddings(Painter(), prompts, folder=None, chunk=1)


EDIT = Prompt("make it blue", image=PictureFile("a.png", "0"))
TEXT = Prompt("a blue cube")


@pytest.mark.parametrize(
    ("use", "prompts", "words"),
    [
        ("never", [TEXT, EDIT], "carry pictures, such as 'make it blue', but a Pipe takes none"),
        ("always", [EDIT, TEXT], "carry no picture, such as 'a blue cube', but a Pipe edits one"),
        ("sometimes", [EDIT, TEXT], "others, such as 'a blue cube', do not"),
        ("never", [TEXT], None),
        ("sometimes", [TEXT], None),
        ("sometimes", [EDIT], None),
        ("always", [EDIT], None),
        ("always", [], None),
    ],
)
def test_prompts_suit_what_the_model_does_with_pictures(use, prompts, words):
    """Mutation: swap two refusals, or let a mixture pass."""
    if words is None:
        check_use("Pipe", use, prompts)
        return
    with pytest.raises(UserError, match=words) as error:
        check_use("Pipe", use, prompts)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_to_be_read_yet_is_told_at_its_loading():
    """Unless pictures stand in question. Mutation: refuse both, or neither."""

    class Far:
        encode_edits = None

        @classmethod
        def picture_use(cls, pretrained, revision):
            raise UserError(f"{pretrained} is far away")

    check_config(Far, {"pretrained": "a/b"}, [TEXT])
    with pytest.raises(UserError, match="a/b is far away"):
        check_config(Far, {"pretrained": "a/b"}, [EDIT])


def test_a_key_that_no_line_has_is_refused(lines):
    """Unless it is the usual one. Mutation: read on without pictures."""
    path = lines({"source": "b.png"}, {})
    assert [prompt.image for prompt in read(path)] == [None, None]
    with pytest.raises(UserError, match=r"image=surce, but no line has a picture by the key"):
        read(path, image="surce")
