"""What the check of a derived model says of the steps at which it asks each of several networks."""

import pytest

from flowrl.training.parity import Parity, untrained_networks

MEASURED = dict.fromkeys(("velocity", "rollout", "image", "rows", "replay"), 0.0)


@pytest.mark.parametrize(
    ("steps", "words"),
    [([3], "step 3"), ([1, 2, 3], "steps 1 to 3"), ([0, 2, 4], "steps 0, 2, 4")],
)
def test_steps_that_alternate_are_listed(steps, words):
    """Mutation: name the first and the last one alone."""
    parity = Parity(
        guidance_scale=4.0,
        num_steps=5,
        has_gradient=1,
        num_trained=2,
        num_frames=None,
        steps={"transformer_2": steps},
        **MEASURED,
    )
    assert parity.describe().endswith(f"; transformer_2 at {words}")


def test_a_network_that_only_other_steps_ask_goes_untrained():
    """Mutation: ask at which steps of a rollout it has a part, and not at which ones are trained
    on.
    """
    steps = {"transformer": [0, 1, 2], "transformer_2": [3, 4]}
    assert untrained_networks(steps, (1, 2)) == ["transformer_2"]
    assert untrained_networks(steps, (1, 3)) == []
    assert untrained_networks(steps, ()) == []
    assert untrained_networks({}, (1, 2)) == []
