"""The lines of a card that load published weights draw clips where the model does."""

import pytest
import torch
from families import FAMILIES

from flowrl.sharing.loading_code import draws_clips, loading_code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random text-to-video pipeline."""
    return FAMILIES["wan21"].save(tmp_path_factory.mktemp("pipelines") / "wan21")


def config_of(folder, num_frames):
    """The part of a run's configuration that a card's code is made of."""
    call = {name: FAMILIES["wan21"].call[name] for name in ("height", "width")}
    return {
        "model": {
            "pretrained": str(folder),
            "dtype": "float32",
            "call": {**call, "num_frames": num_frames},
        },
        "evaluation": {"num_steps": 2, "guidance_scale": 1.0},
    }


def test_the_lines_draw_a_clip(folder):
    """Up to the file, which wants a video library, and without the weights, of which there are
    none.

    Mutation: ask a video pipeline's output for images.
    """
    # A card names a folder without its place.
    code = loading_code(config_of(folder, 5), "me/lora", "").replace('"wan21"', f'"{folder}"')
    lines = code.splitlines()
    assert "from diffusers.utils import export_to_video" in lines
    assert lines[-2:] == [").frames[0]", 'export_to_video(frames, "clip.mp4")']
    kept = [line for line in lines[:-1] if "cuda" not in line and "load_lora" not in line]
    names = {}
    torch.manual_seed(0)
    exec(compile("\n".join(kept), "card", "exec"), names)
    assert len(names["frames"]) == 5


@pytest.mark.parametrize(("num_frames", "is_clip"), [(1, False), (None, False), (5, True)])
def test_one_frame_is_an_image(num_frames, is_clip):
    """Mutation: every call with a number of frames is a clip's."""
    config = config_of("ORG/NAME", num_frames)
    assert draws_clips(config) is is_clip
    assert draws_clips({"model": {"call": None}}) is draws_clips({}) is False
    code = loading_code(config, "me/lora", "")
    assert code.endswith('image.save("image.png")') is not is_clip
