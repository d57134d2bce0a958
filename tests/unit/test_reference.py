import pytest
import torch

from flowrl.gaussian import GaussianStep
from flowrl.losses.reference import ReferencePenalty
from flowrl.schedule import Interval

FORMS = [("kl", 0.1), ("mean_squared", 0.05), ("velocity", 1.25), ("flow_grpo", 0.025)]
INTERVAL = Interval(0.75, 0.5, 0.9)


def distance(form, offset=(0.1, 0.3), shape=(1, 1, 2)):
    mean = torch.tensor([offset, (0.0, 0.0)], dtype=torch.float64).view(2, *shape)
    penalty = ReferencePenalty(form=form, beta=1e-3, guidance_scale=1.0)
    return penalty(GaussianStep(mean, 0.5), torch.zeros_like(mean), INTERVAL, gain=-0.2).tolist()


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1), (1, 2, 1, 1)])
@pytest.mark.parametrize(("form", "expected"), FORMS)
def test_forms_by_hand(form, expected, shape):
    """(0.1, 0.3) off at std 1/2, dt -1/4: mean square 0.05, KL 0.05 / (2/4), times 1/4 as published
    by Flow-GRPO; at a gain of -1/5 the velocities differ five times as much.

    Mutation: drop the factor 2, sum over dimensions, multiply by dt with its sign, or fold beta in.
    """
    assert distance(form, shape=shape) == pytest.approx([expected, 0], rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"), [({"beta": -1.0}, r"penalty.beta=-1\.0"), ({"form": "cosine"}, "cosine")]
)
def test_wrong_values_are_named(change, message):
    """Mutation: drop a check of the constructor."""
    with pytest.raises(Exception, match=message):
        ReferencePenalty(**{"form": "kl", "beta": 0.0, "guidance_scale": 1.0} | change)
