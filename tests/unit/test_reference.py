import pytest
import torch

from flowrl.gaussian import MEAN_KL, GaussianStep
from flowrl.losses.reference import ReferencePenalty
from flowrl.samplers.cps import CPS
from flowrl.samplers.protocol import HasPublishedStd
from flowrl.samplers.sde import DanceSDE, FlowSDE
from flowrl.schedule import Interval, LinearShift, intervals

FORMS = [("kl", 0.1), ("mean_squared", 0.05), ("velocity", 1.25), ("flow_grpo", 0.025)]


def distance(form, offset=(0.1, 0.3), shape=(1, 1, 2)):
    mean = torch.tensor([offset, (0.0, 0.0)], dtype=torch.float64).view(2, *shape)
    penalty = ReferencePenalty(form=form, beta=1e-3, guidance_scale=1.0)
    step = GaussianStep(mean, 0.5)
    return penalty(step, torch.zeros_like(mean), gain=-0.2, published_std=1.0).tolist()


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 1), (1, 2, 1, 1)])
@pytest.mark.parametrize(("form", "expected"), FORMS)
def test_forms_by_hand(form, expected, shape):
    """(0.1, 0.3) off at std 1/2: mean square 0.05, KL 0.05 / (2/4), and 0.05 / 2 where the
    published std is 1; at a gain of -1/5 the velocities differ five times as much.

    Mutation: drop the factor 2, sum over dimensions, divide by std, or fold beta in.
    """
    assert distance(form, shape=shape) == pytest.approx([expected, 0], rel=1e-12)


@pytest.mark.parametrize(
    ("sampler", "published"),
    [
        (FlowSDE(noise_level=0.7), 0.05 / (2 * 0.49 * 3)),
        (DanceSDE(noise_level=0.5), 0.05 / (2 * 0.25)),
        (CPS(noise_level=1.0), 0.05 / (2 * 0.25)),
    ],
    ids=["flow_sde", "dance_sde", "cps"],
)
def test_each_sampler_has_its_published_penalty(sampler, published):
    """From sigma 3/4 to 1/2: Flow-SDE's g^2 is 0.49 (3/4) / (1/4), Dance-SDE's its noise level's
    square, both without dt; CPS at noise level 1 has a std of sigma_next.

    Mutation: -dt on every sampler, or the whole step's std of an SDE.
    """
    interval = Interval(0.75, 0.5, 0.9)
    assert isinstance(sampler, HasPublishedStd)
    mean = torch.tensor([[0.1, 0.3]], dtype=torch.float64)
    penalty = ReferencePenalty(form="flow_grpo", beta=0.04, guidance_scale=1.0)
    distance = penalty(
        GaussianStep(mean, sampler.std(interval)),
        torch.zeros_like(mean),
        gain=sampler.gain(interval),
        published_std=sampler.published_std(interval),
    )
    assert distance.tolist() == pytest.approx([published], rel=1e-12)


def test_of_an_sde_it_is_the_kl_times_the_length_of_the_step():
    """Bitwise in float32, so that a run of Flow-GRPO keeps its numbers. Mutation: another order of
    the divisions, which moves last bits, or a divisor without the square.
    """
    sampler = FlowSDE(noise_level=0.7)
    penalty = ReferencePenalty(form="flow_grpo", beta=0.04, guidance_scale=1.0)
    mean, ref_mean = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).unbind()
    for interval in intervals(LinearShift(shift=3.0), 10):
        step = GaussianStep(mean, sampler.std(interval))
        published_std = sampler.published_std(interval)
        found = penalty(step, ref_mean, gain=1.0, published_std=published_std)
        assert torch.equal(found, MEAN_KL.kl(step, ref_mean) * -interval.dt)


@pytest.mark.parametrize(
    ("change", "message"), [({"beta": -1.0}, r"penalty.beta=-1\.0"), ({"form": "cosine"}, "cosine")]
)
def test_wrong_values_are_named(change, message):
    """Mutation: drop a check of the constructor."""
    with pytest.raises(Exception, match=message):
        ReferencePenalty(**{"form": "kl", "beta": 0.0, "guidance_scale": 1.0} | change)
