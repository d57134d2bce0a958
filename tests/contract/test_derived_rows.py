"""A pipeline whose call takes one row alone, which shows when a call for several fails."""

import pytest
import torch
from toys import ToyPipeline, derive

from flowrl.errors import UserError
from flowrl.training.parity import check

PROMPTS = ["a red cube", "two"]


class OneRowGuided(ToyPipeline):
    """Gives its network two times where guidance takes two a row, as some pipelines do."""

    def predict(self, x, t, text, negative, scale):
        velocity = super().predict(x, t, text, negative, scale)
        if negative is not None and len(x) > 1:
            raise RuntimeError(f"the size 2 must match {2 * len(x)}")
        return velocity


def test_a_call_that_fails_for_several_rows_and_not_for_one_is_made_a_row(monkeypatch, caplog):
    """At this guidance scale, with the numbers of a call for both, which is told once, with the
    reason. Mutations: try both in one call every time, or ask for rows at every scale.
    """
    model = derive(monkeypatch, OneRowGuided)
    plain = derive(monkeypatch)
    rows = plain.encode_prompts(PROMPTS)
    x = torch.tensor([[1.0, 2.0], [-4.0, 8.0]])
    counts = []
    model.transformer.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    for scale in (3.0, 1.0, 3.0):
        assert torch.equal(
            model.velocity(x, 0.25, rows, scale), plain.velocity(x, 0.25, rows, scale)
        )
    assert counts == [2, 2, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert model.stock.alone_at == {3.0}
    (told,) = [record.getMessage() for record in caplog.records]
    assert "one row a call at guidance_scale=3" in told
    assert told.endswith("with 2 rows, its call fails (RuntimeError: the size 2 must match 4)")
    everything = dict(model.transformer.requires_grad_(True).named_parameters())
    for measured in check(model, rows, everything, scales=[1.0, 3.0], num_steps=4, seed=0):
        assert (measured.velocity, measured.rollout, measured.rows) == (0, 0, 0)


class FailsAlways(ToyPipeline):
    def predict(self, *args):
        super().predict(*args)
        raise RuntimeError("it fails for any")


def test_a_call_that_fails_for_one_row_too_is_not_made_a_row(monkeypatch, caplog):
    """Its own error is told. Mutation: remember the scale before the rows have gone through."""
    model = derive(monkeypatch, FailsAlways)
    with pytest.raises(RuntimeError, match="it fails for any"):
        model.velocity(torch.ones(2, 2), 0.25, model.encode_prompts(PROMPTS), 3.0)
    assert model.stock.alone_at == set() and not caplog.records


class FailsLater(ToyPipeline):
    """Takes several rows until it is told to fail, as a device may for a moment."""

    is_failing = False

    def predict(self, x, *args):
        if self.is_failing and len(x) > 1:
            raise RuntimeError("a moment's fault")
        return super().predict(x, *args)


def test_a_call_that_has_gone_through_is_not_made_a_row_later(monkeypatch):
    """A replay by single rows would not be its rollout's. Mutation: fall back at any time."""
    model = derive(monkeypatch, FailsLater)
    rows = model.encode_prompts(PROMPTS)
    x = torch.ones(2, 2)
    model.velocity(x, 0.25, rows, 3.0)
    monkeypatch.setattr(FailsLater, "is_failing", True)
    with pytest.raises(UserError, match=r"its call fails .*a moment's fault"):
        model.velocity(x, 0.25, rows, 3.0)
    assert model.stock.alone_at == set()
