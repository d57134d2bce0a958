"""An optimizer steps all weights in one call, which changes no number."""

import pytest
import torch

from flowrl.training import optimization
from flowrl.training.optimization import at_once

SHAPES = [(4, 16), (16, 4), (16,), ()]
KINDS = [torch.optim.AdamW, torch.optim.Adam]


def weights_after(kind, *, is_at_once):
    """The weights that thirty steps give from fixed ones, with gradients as small as ours."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    optimizer = kind(weights, lr=1e-2, weight_decay=1e-2, eps=1e-12)
    if is_at_once:
        assert at_once(optimizer) is optimizer
        assert optimizer.param_groups[0]["foreach"] is True
    for _ in range(30):
        for weight in weights:
            weight.grad = 1e-7 * torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_stay(kind):
    """Bitwise. Mutation: leave the choice to PyTorch, or take its fused kernel, which rounds
    otherwise.
    """
    pairs = zip(
        weights_after(kind, is_at_once=True), weights_after(kind, is_at_once=False), strict=True
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("words", [{"foreach": False}, {"fused": True}])
def test_what_was_asked_for_is_kept(words):
    """Mutation: overrule it."""
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], **words)
    before = optimizer.param_groups[0]["foreach"]
    assert at_once(optimizer).param_groups[0]["foreach"] is before


class Divided(torch.Tensor):
    """Stands for a weight that processes hold a part each of."""


def test_divided_weights_are_left_alone(monkeypatch):
    """A step would hold a temporary of all of them. Mutation: look at the optimizer alone."""
    monkeypatch.setattr(optimization, "DTensor", Divided)
    weight = torch.zeros(2).as_subclass(Divided).requires_grad_()
    optimizer = torch.optim.AdamW([weight])
    assert at_once(optimizer).param_groups[0]["foreach"] is None


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.SGD, torch.optim.SparseAdam])
def test_others_are_left_alone(kind):
    """NAdam rounds otherwise, SparseAdam has no such setting. Mutation: set it for all."""
    optimizer = kind([torch.zeros(2, requires_grad=True)])
    assert at_once(optimizer).param_groups[0].get("foreach") is None
