"""The state of each loss of conf/loss survives a resumption and a copy."""

import copy
import json
import pickle
from collections import defaultdict

import pytest
import torch
from each_loss import NEAR, draw, inputs_of, numbers, output_of


def followed(loss):
    """A loss that has followed some of a run."""
    loss.begin(0.25)
    loss.observe(defaultdict(lambda: 3e-5), 10)
    return loss


def test_a_resumed_run_goes_on_with_the_same_loss(algorithm):
    """Its state survives JSON, to the last bit, and so does what follows. Mutation: leave a number
    out of the state, or round it.
    """
    fresh = copy.deepcopy(algorithm)
    state = followed(algorithm.loss).state()
    fresh.loss.load_state(json.loads(json.dumps(state)))
    assert fresh.loss.state() == state
    algorithm.loss.begin(0.5)
    fresh.loss.begin(0.5)
    (got, gradient), (expected, wanted) = (output_of(one, draw(NEAR)) for one in (fresh, algorithm))
    assert torch.equal(got.loss, expected.loss) and torch.equal(gradient, wanted)
    assert numbers(got) == numbers(expected)


@pytest.mark.parametrize("remade", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_is_the_same_loss(algorithm, remade):
    """Also one that has followed a run. Mutation: keep what cannot be copied, or outside of the
    object.
    """
    before = followed(algorithm.loss)
    copied = remade(before)
    assert copied == before and copied is not before and copied.state() == before.state()
    inputs = inputs_of(algorithm, draw(NEAR))
    (got, expected) = (loss(inputs) for loss in (copied, before))
    assert torch.equal(got.loss, expected.loss) and numbers(got) == numbers(expected)
