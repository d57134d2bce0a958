import base64
import io
import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from flowrl.rewards import wire
from flowrl.rewards.outputs import concatenate, first_reason, missing
from flowrl.types import Prompt, RewardOutput


def encode(size=(4, 4), mode="RGB", form="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, 0).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width, height):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def body(images, prompts=None):
    return json.dumps({"images": images, "prompts": prompts or [{"text": "a"} for _ in images]}).encode()


def read(data, max_images=11, max_pixels=1000):
    asked = wire.read_request(data, max_images=max_images, max_pixels=max_pixels)
    return asked.images(), asked.prompts


def test_images_and_prompts_arrive():
    """Eight-bit levels come through exactly, others rounded; metadata as JSON. Mutation: swap axes, or truncate."""
    levels = torch.randint(0, 256, (3, 3, 5, 5), generator=torch.Generator().manual_seed(0)) / 255
    prompts = [Prompt("a", "single", {"n": [1, "x"]}), Prompt("Ω", "", {}), Prompt("c", "d", {"e": None})]
    images, read_prompts = read(json.dumps(wire.request(levels, prompts)).encode())
    assert torch.equal(images, levels.float()) and read_prompts == prompts
    shifted, _ = read(json.dumps(wire.request((levels + 0.4 / 255).clamp(0, 1), prompts)).encode())
    assert torch.equal(shifted, levels.float())


def test_an_image_bomb_is_refused_before_it_is_decoded():
    """Its header says 10^10 pixels; so does a second header behind an innocent one; many small ones add up.

    Mutation: decode first, trust the first header, or count each image alone.
    """
    start = b"\x89PNG\r\n\x1a\n"
    end = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    for headers in (header(10**5, 10**5), header(2, 2) + header(10**5, 10**5)):
        bomb = base64.b64encode(start + headers + end).decode()
        with pytest.raises(wire.TooLarge, match=r"10000000000 pixels.*max_pixels=1000"):
            read(body([bomb]))
    read(body([encode((10, 10))] * 10))
    with pytest.raises(wire.TooLarge, match="1100 pixels"):
        read(body([encode((10, 10))] * 11))


def test_pictures_are_sent_as_tensors_are():
    """A list of pictures in another mode is one request too. Mutation: ask a picture for its device."""
    tensor = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    pictures = [Image.new("L", (4, 4), 0), Image.new("RGBA", (4, 4), "white")]
    assert wire.request(pictures, [Prompt("a")] * 2) == wire.request(tensor, [Prompt("a")] * 2)


def test_the_images_of_a_request_are_counted_before_they_are_looked_at():
    """Mutation: open them first."""
    with pytest.raises(wire.TooLarge, match=r"3 images.*max_images=2"):
        read(body(["?"] * 3), max_images=2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04pickle", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "a JSON object was expected"),
        (body([]), "at least 1"),
        (body([encode()], [{"text": "a"}, {"text": "b"}]), "one length"),
        (body([encode(form="BMP")]), "not a base64 PNG"),
        (body(["?"]), "not a base64 PNG"),
        (body([7]), "not a base64 PNG"),
        (body([wire.png(Image.effect_noise((16, 16), 50).convert("RGB"))[:400]]), "damaged PNG"),
        (body([encode(), encode((5, 5))]), "one size"),
        (body([encode()], [{"family": "x"}]), "a `text`"),
        (body([encode()], [{"text": "a", "metadata": [1]}]), "`metadata`"),
    ],
)
def test_what_is_no_request_is_refused(data, words):
    """Mutation: let any other exception through, which would be the server's fault."""
    with pytest.raises(ValueError, match=words):
        read(data)


def test_other_pngs_become_rgb():
    """Mutation: drop the conversion."""
    images, _ = read(body([encode(mode="L"), encode(mode="RGBA"), encode(mode="I;16")]))
    assert images.shape == (3, 3, 4, 4)


def test_16_bit_pngs_are_scaled():
    """257 is level 1, 65,535 is 255. Mutation: Pillow's conversion, which makes all above 255 white."""
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(file, "PNG")
    images, _ = read(body([base64.b64encode(file.getvalue()).decode()]))
    assert (images * 255).round()[0, :, 0].tolist() == [[0, 1, 128, 255]] * 3


def test_a_missing_score_is_null_on_the_way_and_missing_behind_it():
    """Mutation: send its value, or read null as 0."""
    output = RewardOutput(
        torch.tensor([0.25, 7.0, 0.5]),
        torch.tensor([True, False, True]),
        {"part": torch.tensor([1.0, math.nan, 2.0])},
        [{}, {"missing": "no text found"}, {}],
    )
    sent = wire.answer(output)
    assert sent == {
        "values": [0.25, None, 0.5],
        "parts": {"part": [1.0, None, 2.0]},
        "reasons": [None, "no text found", None],
        "applies": [True, True, True],
    }
    got = wire.read_answer(json.dumps(sent).encode(), 3)
    assert got.values.tolist() == [0.25, 0, 0.5] and got.is_valid.tolist() == [True, False, True]
    assert got.parts["part"].isnan().tolist() == [False, True, False]
    assert got.info == [{}, {"missing": "no text found"}, {}]


def test_values_that_are_no_numbers_are_missing():
    """JSON has no NaN, but Python's reader takes it. Mutation: nan_to_num before looking."""
    got = wire.read_answer(b'{"values": [1, NaN, Infinity, -Infinity, null]}', 5)
    assert got.is_valid.tolist() == [True, False, False, False, False]
    assert got.values.tolist() == [1, 0, 0, 0, 0]
    assert first_reason(got.info) == "the server gave no number"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<html>", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[0.5, 0.5]", "a JSON object"),
        (b"{}", "2 images, but values: NoneType"),
        (b'{"values": [0.5]}', "2 images, but values: 1 entries"),
        (b'{"values": [0.5, 0.5, 0.5]}', "2 images, but values: 3 entries"),
        (b'{"values": ["0.5", 0.5]}', "numbers or null, not '0.5'"),
        (b'{"values": [true, 0.5]}', "numbers or null, not True"),
        (b'{"values": [1' + b"0" * 400 + b", 0.5]}", "values"),
        (b'{"values": [1, 1], "parts": {"p": [1]}}', "part p: 1 entries"),
        (b'{"values": [1, 1], "parts": {"p/q": [1, 1]}}', "without a slash"),
        (b'{"values": [1, 1], "parts": [1, 1]}', "`parts`"),
        (b'{"values": [1, 1], "reasons": ["x"]}', "`reasons`"),
    ],
)
def test_an_unusable_answer_says_what_is_wrong(data, words):
    """Mutation: pad or cut to length, or take what looks like a number."""
    with pytest.raises(ValueError, match=words):
        wire.read_answer(data, 2)


def test_outputs_are_put_together_in_order():
    """A part that one lacks is NaN there. Mutation: drop it, or lose the reasons' places."""
    good = RewardOutput(torch.tensor([1.0, 2.0]), torch.tensor([True, True]), {"p": torch.tensor([3.0, 4.0])})
    whole = concatenate([missing(1, "late"), good, missing(1, "lost")])
    assert whole.values.tolist() == [0, 1, 2, 0] and whole.is_valid.tolist() == [False, True, True, False]
    assert whole.parts["p"].isnan().tolist() == [True, False, False, True]
    assert [entry.get("missing") for entry in whole.info] == ["late", None, None, "lost"]
    assert first_reason(whole.info) == "late" and first_reason([{}, {}]) is None


def test_a_prompt_that_the_scorer_has_nothing_to_say_about_is_not_missing():
    """Neither missing nor zero on the other side. Mutation: leave `applies` out of the answer."""
    applies = torch.tensor([[True], [False]])
    output = RewardOutput(torch.tensor([0.5, torch.nan]), torch.tensor([True, True]), applies=applies)
    read = wire.read_answer(json.dumps(wire.answer(output)).encode(), 2)
    assert read.is_valid.all() and torch.equal(read.applies, applies) and read.values[0] == 0.5
