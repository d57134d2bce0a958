"""The spread of a prompt's images, which come in batches."""

import pytest
import torch

from flowrl.evaluation.shares import Spreads, spread


def test_a_prompt_may_be_cut_by_a_batch():
    """Three prompts of two images in batches of three: per prompt, |a - b|^2 of its two, 0.01, 0.04
    and 0.16, as all at once.

    Mutation: measure within batches, or hold what has been measured.
    """
    levels = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.9, 0.5])
    images = levels[:, None, None, None].repeat(1, 3, 2, 2)
    spreads = Spreads(2)
    spreads.add(images[:3])
    assert len(spreads.waiting) == 1
    spreads.add(images[3:])
    assert spreads.waiting == []
    assert spreads.so_far().tolist() == pytest.approx([0.01, 0.01, 0.04, 0.04, 0.16, 0.16])
    assert torch.equal(spreads.so_far(), spread(list(images), 2))


def test_of_one_image_there_is_no_spread():
    """Clips have as many axes as they have. Mutation: call it 0."""
    spreads = Spreads(1)
    spreads.add(torch.zeros(2, 5, 3, 2, 2))
    assert spreads.so_far().isnan().all() and len(spreads.so_far()) == 2
