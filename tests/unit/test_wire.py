import base64
import io
import json
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from flowrl.rewards import wire
from flowrl.rewards.outputs import concatenate, first_reason, missing
from flowrl.rewards.png import decode
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
    return json.dumps(
        {"images": images, "prompts": prompts or [{"text": "a"} for _ in images]}
    ).encode()


def read(data, max_images=11, max_image_bytes=10_000, max_decoded_bytes=100_000):
    return wire.read_request(
        data,
        max_images=max_images,
        max_image_bytes=max_image_bytes,
        max_decoded_bytes=max_decoded_bytes,
    )


def file(*chunks, pixels=b"\0" * 100):
    """A PNG of these chunks, its pixels and its end."""
    content = b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + content).decode()


def test_images_and_prompts_arrive():
    """Eight-bit levels come through exactly, others rounded; metadata as JSON. Mutation: swap axes,
    or truncate.
    """
    levels = torch.randint(0, 256, (3, 3, 5, 5), generator=torch.Generator().manual_seed(0)) / 255
    prompts = [
        Prompt("a", "single", {"n": [1, "x"]}),
        Prompt("Ω", "", {}),
        Prompt("c", "d", {"e": None}),
    ]
    asked = read(json.dumps(wire.request(levels, prompts)).encode())
    assert torch.equal(asked.images(), levels.float()) and asked.prompts == prompts
    assert torch.equal(asked.pixels(), (levels * 255).round().byte())
    shifted = read(json.dumps(wire.request((levels + 0.4 / 255).clamp(0, 1), prompts)).encode())
    assert torch.equal(shifted.images(), levels.float())


def test_an_image_bomb_is_refused_before_it_is_decoded():
    """One bit a pixel in the file is three bytes decoded: 8192 x 8192 x 3 = 201,326,592. Behind its
    header is nothing.

    Mutation: decode first, count the file's bits, or count an image by the size of its file.
    """
    bomb = file(chunk(b"IHDR", struct.pack(">IIBBBBB", 8192, 8192, 1, 0, 0, 0, 0)), pixels=b"")
    with pytest.raises(
        wire.TooLarge, match=r"8192 x 8192 takes 201326592 bytes decoded.*max_image_bytes=67108864"
    ):
        read(body([bomb]), max_image_bytes=64 << 20, max_decoded_bytes=256 << 20)


def test_the_images_of_a_request_are_counted_together():
    """Each of 20 x 20 takes 1200 bytes, ten of them 12,000 and their prompts some more. Mutation:
    count each alone.
    """
    images = [encode((20, 20))] * 10
    num_bytes = read(body(images)).num_bytes
    assert 12_000 < num_bytes < 20_000
    assert read(body(images), max_decoded_bytes=num_bytes).num_bytes == num_bytes
    with pytest.raises(
        wire.TooLarge, match=f"takes {num_bytes} bytes.*max_decoded_bytes={num_bytes - 1}"
    ):
        read(body(images), max_decoded_bytes=num_bytes - 1)
    assert read(body(images + images[:1])).num_bytes > num_bytes + 1200


def test_prompts_count_as_what_they_take():
    """An empty object is 3 bytes of a body and 64 in Python. Mutation: count pixels alone, or after
    parsing.
    """
    small = read(body([encode()])).num_bytes
    prompts = [{"text": "a", "metadata": {"n": [1] * 500}}]
    assert read(body([encode()], prompts)).num_bytes > small + 50_000
    with pytest.raises(
        wire.TooLarge, match=r"JSON values of 100200 bytes.*max_decoded_bytes=100000"
    ):
        read(b'{"images": [' + b"{}," * 500 + b"broken")


def test_a_second_header_is_refused():
    """Pillow would take its size. Mutation: hand it over."""
    with pytest.raises(ValueError, match="a second header"):
        read(body([file(header(2, 2), header(10**5, 10**5))])).pixels()


def test_a_file_is_decoded_without_what_pixels_do_not_need():
    """Sixty texts that inflate to 60 MiB, a profile that is no profile, and the frames of an
    animation change nothing.

    Mutation: hand the whole file to Pillow, or drop the palette.
    """
    picture = Image.effect_noise((8, 8), 90).convert("P")
    stream = io.BytesIO()
    picture.save(stream, "PNG", transparency=3)
    data = stream.getvalue()
    text = zlib.compress(b"x" * (1 << 20))
    extras = [chunk(b"zTXt", b"key %d\0\0" % i + text) for i in range(60)]
    extras += [
        chunk(b"iCCP", b"p\0\0" + zlib.compress(b"\0" * (1 << 22))),
        chunk(b"acTL", struct.pack(">II", 2, 0)),
    ]
    loaded = base64.b64encode(data[:33] + b"".join(extras) + data[33:]).decode()
    plain = base64.b64encode(data).decode()
    pixels, num_bytes = with_peak(lambda: decode(loaded))
    assert num_bytes < 1 << 20
    assert torch.equal(pixels, decode(plain))
    assert torch.equal(decode(plain), pil_to_tensor(picture.convert("RGB")))


def with_peak(work):
    """The result of `work`, and the most bytes that Python held meanwhile."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_decoding_takes_beside_the_pixels(dtype):
    """Of 1024 x 1024 the pixels have 3 MiB; what comes on top is a tile's. Pillow's picture is not
    counted here.

    Mutation: convert the picture as a whole, which takes 7 MiB of 16-bit greys and 6 of 8-bit ones.
    """
    picture = io.BytesIO()
    Image.fromarray(np.zeros((1024, 1024), dtype)).save(picture, "PNG")
    encoded = base64.b64encode(picture.getvalue()).decode()
    pixels, num_bytes = with_peak(lambda: decode(encoded))
    assert pixels.shape == (3, 1024, 1024) and num_bytes < 4 << 20


def test_a_file_of_very_many_chunks_is_refused():
    """Each costs time, even empty. Pixels in chunks of 1 KiB are fine. Mutation: no bound."""
    with pytest.raises(ValueError, match="65 chunks in its first"):
        decode(file(header(2, 2), *[chunk(b"IDAT", b"")] * 1000))
    rows = zlib.compress(b"".join(b"\0" + bytes(600) for _ in range(200)), 0)
    pieces = [chunk(b"IDAT", rows[i : i + 1024]) for i in range(0, len(rows), 1024)]
    assert len(pieces) > 64
    whole = b"\x89PNG\r\n\x1a\n" + header(200, 200) + b"".join(pieces) + chunk(b"IEND", b"")
    assert decode(base64.b64encode(whole).decode()).shape == (3, 200, 200)


def test_pictures_are_sent_as_tensors_are():
    """A list of pictures in another mode is one request too. Mutation: ask a picture for its
    device.
    """
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
        (b"[" * 900, "not JSON: recursion limit"),
        (b"[1]", "a JSON object was expected"),
        (body([]), "at least 1"),
        (body([encode()], [{"text": "a"}, {"text": "b"}]), "one length"),
        (body([encode(form="BMP")]), "not a base64 PNG"),
        (body(["?"]), "not a base64 PNG"),
        (body([7]), "not a base64 PNG"),
        (body([wire.png(Image.effect_noise((16, 16), 50).convert("RGB"))[:400]]), "damaged PNG"),
        (body([encode(), encode((5, 5))]), "one size"),
        (body([file(header(0, 4))]), "not a base64 PNG: no header"),
        (body([encode()[:40]]), "not a base64 PNG"),
        (b'{"images": ["\\ud800"], "prompts": []}', "not JSON"),
        (body([encode()], [{"family": "x"}]), "a `text`"),
        (body([encode()], [{"text": "a", "metadata": [1]}]), "`metadata`"),
    ],
)
def test_what_is_no_request_is_refused(data, words):
    """Mutation: let any other exception through, which would be the server's fault."""
    with pytest.raises(ValueError, match=words):
        read(data).pixels()


def test_other_pngs_become_rgb():
    """Mutation: drop the conversion."""
    images = read(body([encode(mode="L"), encode(mode="RGBA"), encode(mode="I;16")])).images()
    assert images.shape == (3, 3, 4, 4)


def test_16_bit_pngs_are_scaled():
    """257 is level 1, 65,535 is 255. Mutation: Pillow's conversion, which makes all above 255
    white.
    """
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(file, "PNG")
    images = read(body([base64.b64encode(file.getvalue()).decode()])).images()
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
    good = RewardOutput(
        torch.tensor([1.0, 2.0]), torch.tensor([True, True]), {"p": torch.tensor([3.0, 4.0])}
    )
    whole = concatenate([missing(1, "late"), good, missing(1, "lost")])
    assert whole.values.tolist() == [0, 1, 2, 0] and whole.is_valid.tolist() == [
        False,
        True,
        True,
        False,
    ]
    assert whole.parts["p"].isnan().tolist() == [True, False, False, True]
    assert [entry.get("missing") for entry in whole.info] == ["late", None, None, "lost"]
    assert first_reason(whole.info) == "late" and first_reason([{}, {}]) is None


def test_a_prompt_that_the_scorer_has_nothing_to_say_about_is_not_missing():
    """Neither missing nor zero on the other side. Mutation: leave `applies` out of the answer."""
    applies = torch.tensor([[True], [False]])
    output = RewardOutput(
        torch.tensor([0.5, torch.nan]), torch.tensor([True, True]), applies=applies
    )
    read = wire.read_answer(json.dumps(wire.answer(output)).encode(), 2)
    assert read.is_valid.all() and torch.equal(read.applies, applies) and read.values[0] == 0.5
