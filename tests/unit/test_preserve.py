import numpy as np
import pytest
import torch
from PIL import Image
from runs import composed

from flowrl.errors import UserError
from flowrl.launch.scores import check_served
from flowrl.rewards.images import to_tensor
from flowrl.rewards.preserve import Preserve
from flowrl.training.reward import RewardModule
from flowrl.types import PictureFile, Prompt


@pytest.fixture
def edit(tmp_path):
    """Prompts whose picture is grey, with or without a mask of these levels, row by row."""

    def make(mask=None, size=(2, 2)):
        Image.new("RGB", size, (51, 51, 51)).save(tmp_path / "source.png")
        image = PictureFile(str(tmp_path / "source.png"), "source")
        if mask is None:
            return Prompt("make it red", image=image)
        name = "-".join(map(str, np.ravel(mask)))
        Image.fromarray(np.array(mask, dtype=np.uint8)).save(tmp_path / f"{name}.png")
        return Prompt(
            "make it red", image=image, mask=PictureFile(str(tmp_path / f"{name}.png"), name)
        )

    return make


def picture(*rows):
    """A grey picture of these levels."""
    return Image.fromarray(np.array(rows, dtype=np.uint8)).convert("RGB")


def test_errors_by_hand(edit):
    """A source of 51, which is .2: one pixel of four is 1, and the errors are .8/4 and .64/4.

    Mutations: sum for mean, or the other error.
    """
    edited = picture([255, 51], [51, 51])
    absolute, squared = (
        Preserve(error=error)([edited, picture([51, 51], [51, 51])], [edit()] * 2)
        for error in ("absolute", "squared")
    )
    torch.testing.assert_close(absolute.values, torch.tensor([0.8, 1.0]))
    torch.testing.assert_close(squared.values, torch.tensor([0.84, 1.0]))
    torch.testing.assert_close(absolute.parts["squared_error"], torch.tensor([0.16, 0.0]))
    torch.testing.assert_close(squared.parts["absolute_error"], torch.tensor([0.2, 0.0]))


def test_a_mask_is_white_where_the_picture_is_to_be_kept(edit):
    """An edited pixel costs nothing where the mask is black, and a grey of 51 counts a fifth: of
    errors .8 and 0 by weights .2 and 1 the mean is .16/1.2.

    Mutations: black for kept, a threshold, or the mask left aside.
    """
    edited = picture([255, 51])
    prompts = [edit([[0, 255]], (2, 1)), edit([[51, 255]], (2, 1)), edit([[255, 0]], (2, 1))]
    values = Preserve(error="absolute")([edited] * 3, prompts).values
    torch.testing.assert_close(values, torch.tensor([1.0, 1 - 0.16 / 1.2, 0.2]))


def test_it_has_nothing_to_say_where_nothing_is_to_be_kept(edit):
    """Neither missing nor zero. Mutation: score prompts without a picture as 1, or divide by 0."""
    prompts = [Prompt("a red circle"), edit([[0, 0], [0, 0]]), edit()]
    module = RewardModule(reward=Preserve(error="absolute"), max_missing=0.0)
    output = module.score([picture([51, 51], [51, 51])] * 3, prompts)
    assert output.is_valid.all()
    assert output.has_value.tolist() == [False, False, True]


def test_a_source_of_another_size_is_stretched(edit):
    """Mutation: crop it, or refuse it."""
    prompt = edit([[0] * 8 + [255] * 8] * 4, (16, 4))
    image = picture(*[[255] * 2 + [51] * 6] * 8)
    output = Preserve(error="squared")(to_tensor([image]), [prompt])
    assert output.values.item() == pytest.approx(1.0, abs=1e-6)


def test_options_are_checked():
    """Mutation: take any other word for squared."""
    with pytest.raises(ValueError, match=r"reward.error=cubed must be"):
        Preserve(error="cubed")


def test_it_is_not_served():
    """A server would be sent no picture, and have nothing to say. Mutation: serve it."""
    check_served(composed("reward=jpeg_compressibility").reward)
    with pytest.raises(UserError, match="reward=preserve cannot be served"):
        check_served(composed("reward=preserve").reward)
