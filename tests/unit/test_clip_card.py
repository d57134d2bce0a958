"""The lines of a card that load published weights draw clips where the model does."""

import json

import pytest
import torch
from families import FAMILIES
from PIL import Image

from flowrl.errors import UserError
from flowrl.runs.files import PARITY
from flowrl.sharing.drawn import is_moving, num_frames_of
from flowrl.sharing.loading_code import loading_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random text-to-video pipeline."""
    return FAMILIES["wan21"].save(tmp_path_factory.mktemp("pipelines") / "wan21")


def config_of(folder, **call):
    """The part of a run's configuration that a card's code is made of."""
    size = {name: FAMILIES["wan21"].call[name] for name in ("height", "width")}
    return {
        "model": {"pretrained": str(folder), "dtype": "float32", "call": size | call},
        "evaluation": {"num_steps": 2, "guidance_scale": 1.0},
    }


def run_lines(code, folder):
    """Run a card's lines up to the file, and without the weights, of which there are none; return
    their names.
    """
    # A card names a folder without its place.
    lines = code.replace('"wan21"', f'"{folder}"').splitlines()
    kept = [line for line in lines[:-1] if "cuda" not in line and "load_lora" not in line]
    names = {}
    torch.manual_seed(0)
    exec(compile("\n".join(kept), "card", "exec"), names)
    return names


def test_the_lines_draw_a_clip(folder):
    """Up to the file, which wants a video library. Mutation: ask a video pipeline's output for
    images.
    """
    code = loading_code(config_of(folder, num_frames=5), "me/lora", "", num_frames=5)
    lines = code.splitlines()
    assert "from diffusers.utils import export_to_video" in lines
    assert lines[-2:] == [").frames[0]", 'export_to_video(frames, "clip.mp4")']
    assert len(run_lines(code, folder)["frames"]) == 5


def test_the_lines_draw_a_single_frame_as_a_picture(folder):
    """Which a pipeline of clips returns as one. Mutation: ask its output for images, or save what
    is no picture.
    """
    code = loading_code(config_of(folder, num_frames=1), "me/lora", "", num_frames=1)
    assert code.endswith('image.save("image.png")') and "export_to_video" not in code
    assert isinstance(run_lines(code, folder)["image"], Image.Image)


def record(folder, **check):
    (folder / PARITY).write_text(json.dumps({"checks": [{"guidance_scale": 1.0} | check]}))


def test_what_was_drawn_stands_in_the_record(tmp_path):
    """A call that names no number of frames takes the pipeline's own. Mutation: go by the call
    where the record tells.
    """
    record(tmp_path, num_frames=81)
    assert num_frames_of(config_of("ORG/NAME"), tmp_path) == 81
    record(tmp_path, num_frames=None)
    assert num_frames_of(config_of("ORG/NAME", num_frames=5), tmp_path) is None
    (tmp_path / PARITY).write_text("{")
    with pytest.raises(UserError, match=r"parity\.json is damaged .*restore it"):
        num_frames_of(config_of("ORG/NAME"), tmp_path)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_where_no_record_tells_the_call_does(is_recorded, tmp_path):
    """That of an earlier version does not, and a model with an adapter of its own has none.
    Mutation: take it for a pipeline of pictures.
    """
    if is_recorded:
        record(tmp_path)
    assert num_frames_of(config_of("ORG/NAME", num_frames=5), tmp_path) == 5
    for config in (config_of("ORG/NAME"), {"model": {"call": None}}, {}):
        assert num_frames_of(config, tmp_path) is None


@pytest.mark.parametrize(("num_frames", "is_clip"), [(1, False), (None, False), (5, True)])
def test_one_frame_is_an_image(num_frames, is_clip):
    """Mutation: every result of a pipeline of clips is one."""
    assert is_moving(num_frames) is is_clip
    code = loading_code(config_of("ORG/NAME"), "me/lora", "", num_frames=num_frames)
    assert code.endswith('image.save("image.png")') is not is_clip
