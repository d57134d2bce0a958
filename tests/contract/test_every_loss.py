"""What each loss of conf/loss keeps, whatever its formula: an option added there is tested too."""

import copy
import dataclasses
import json
import math
import pickle
from collections import defaultdict
from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from runs import CONF, composed

from flowrl.algorithm import Algorithm
from flowrl.errors import UserError
from flowrl.losses.protocol import ForwardLoss, Loss, ReverseLoss
from flowrl.losses.used import keep_used, velocity_distance
from flowrl.objectives import OBJECTIVES, check_method
from flowrl.objectives.declared import require_declared
from flowrl.objectives.reverse import loss_inputs
from flowrl.types import ForwardInputs, Trajectory

OPTIONS = sorted(path.stem for path in (CONF / "loss").glob("*.yaml"))
SAMPLERS = sorted(path.stem for path in (CONF / "sampler").glob("*.yaml"))
VARIANTS = {
    "awm": (
        ("loss.weighting=uniform",),
        ("loss.weighting=sigma_squared",),
        ("loss.weighting=generalised_huber",),
    ),
    "dppo": (
        ("loss.delta=auto", "loss.kl_budget=1e-5"),
        ("loss.delta=1e-4", "loss.final_delta=1e-6"),
        ("loss.divergence=tv", "loss.calibrated_for=tv"),
        ("loss.divergence=velocity", "loss.calibrated_for=velocity"),
        ("likelihood.reduction=sum", "loss.calibrated_for=sum_kl"),
    ),
    "grpo": (("likelihood.reduction=sum", "loss.calibrated_for=sum_gaussian"),),
    "nft": (("loss.beta=0.1",),),
}
"""Overrides under which an option computes or keeps something else."""
CASES = [(option, *more) for option in OPTIONS for more in ((), *VARIANTS.get(option, ()))]
ADVANTAGES = (1.5, -0.5, 2.0, -3.0)
BROKEN = (math.inf, -math.inf, math.nan)


@cache
def method(option, *overrides):
    """The method of a loss's option, with the first sampler that suits it."""
    refusals = []
    for sampler in SAMPLERS:
        cfg = composed(f"loss={option}", f"sampler={sampler}", "penalty=none", *overrides)
        algorithm = instantiate(cfg.algorithm)
        assert isinstance(algorithm, Algorithm)
        try:
            check_method(algorithm)
        except UserError as error:
            refusals.append(str(error))
        else:
            return algorithm
    raise AssertionError(refusals)


@pytest.fixture(params=CASES, ids=" ".join)
def algorithm(request):
    """A method of its own for each test, so that a loss's state is, too."""
    return copy.deepcopy(method(*request.param))


@dataclasses.dataclass
class Samples:
    """Samples at one step or sigma: what a loss's inputs are made of. The velocity is a leaf."""

    x: torch.Tensor
    x0: torch.Tensor
    noise: torch.Tensor
    velocity: torch.Tensor
    old_velocity: torch.Tensor
    advantage: torch.Tensor

    def __getitem__(self, rows):
        """The samples of these rows, with a velocity of their own."""
        chosen = {name: value.detach()[rows] for name, value in vars(self).items()}
        chosen["velocity"] = chosen["velocity"].clone().requires_grad_()
        return Samples(**chosen)

    def replace(self, **changes):
        return dataclasses.replace(self[:], **changes)


def draw(distance, advantage=ADVANTAGES, dtype=torch.float64):
    """Samples whose velocity is `distance` times a normal one away from the old one."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(advantage), 2, 3, 3)
    x, x0, noise, old_velocity, moved = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(5)
    )
    velocity = (old_velocity + distance * moved).requires_grad_()
    return Samples(x, x0, noise, velocity, old_velocity, torch.tensor(advantage, dtype=dtype))


def inputs_of(algorithm, samples, is_used=None):
    """The inputs that the objective of a loss's kind makes of samples."""
    if algorithm.loss.kind == "forward":
        sigma = algorithm.intervals[1].sigma
        if is_used is None:
            is_used = torch.ones(len(samples.x0), dtype=torch.bool)
        return ForwardInputs(
            x0=samples.x0,
            x=torch.lerp(samples.x0, samples.noise, sigma),
            sigma=samples.x0.new_full((len(samples.x0),), sigma),
            velocity=samples.velocity,
            old_velocity=samples.old_velocity,
            advantage=samples.advantage,
            is_used=is_used,
        )
    interval = algorithm.intervals[1]
    old_step = algorithm.sampler.step(samples.x, samples.old_velocity, interval)
    x_next = old_step.sample(samples.noise)
    old_log_prob = algorithm.likelihood.log_prob(old_step, x_next)
    states = (value[:, None] for value in (samples.x, x_next, old_step.mean, old_log_prob))
    step = algorithm.sampler.step(samples.x, samples.velocity, interval)
    return loss_inputs(
        algorithm, step, Trajectory((1,), False, *states, x_next), 0, samples.advantage
    )


def output_of(algorithm, samples):
    """The loss's output, and its gradient with respect to the samples' velocity."""
    output = algorithm.loss(inputs_of(algorithm, samples))
    (gradient,) = torch.autograd.grad(output.loss, samples.velocity)
    return output, gradient


def numbers(output):
    return {name: value.item() for name, value in output.metrics.items()}


FAR, NEAR = 0.3, 1e-5
"""Distances at which clips and masks hold some samples back, and at which most hold none."""
distances = pytest.mark.parametrize("distance", [0.0, NEAR, FAR])


@pytest.mark.parametrize("shape", [(18,), (6, 3), (2, 9), (2, 1, 3, 3), (3, 2, 1, 3, 1)])
@distances
def test_numbers_do_not_depend_on_the_rank(algorithm, distance, shape):
    """Latents of one to five axes instead of three: the same loss, metrics and gradient, bitwise;
    with a sample that is missing, too. Mutation: reduce over three axes, or give a number to each
    row of another axis than the batch's.
    """
    plain = draw(distance)
    shaped = Samples(
        **{
            name: value.detach().reshape(4, *shape) if value.ndim > 1 else value
            for name, value in vars(plain).items()
        }
    )[:]
    is_used = torch.tensor([True, False, True, True])
    for used in (None, is_used):
        found = []
        for samples in (plain, shaped):
            output = algorithm.loss(inputs_of(algorithm, samples, used))
            (gradient,) = torch.autograd.grad(output.loss, samples.velocity)
            assert gradient.shape == samples.x.shape and output.loss.shape == ()
            found.append((output.loss, gradient.flatten(), numbers(output)))
        (loss, gradient, metrics), (expected, wanted, others) = found
        assert torch.equal(loss, expected) and torch.equal(gradient, wanted) and metrics == others


def test_it_says_what_it_is(algorithm):
    """Mutation: a kind that no objective evaluates, or a name that is no option of `loss=`."""
    loss = algorithm.loss
    kinds = {"reverse": ReverseLoss, "forward": ForwardLoss}
    assert isinstance(loss, Loss) and isinstance(loss, kinds[loss.kind])
    assert kinds.keys() == OBJECTIVES.keys()
    assert loss.name in OPTIONS


@distances
def test_what_it_returns_is_declared_and_what_it_declares_is_returned(algorithm, distance):
    """Detached numbers. Mutation: a metric that carries the graph, is NaN or has no meaning."""
    output, _ = output_of(algorithm, draw(distance))
    require_declared(algorithm.loss, output)
    assert algorithm.loss.metrics.keys() <= output.metrics.keys()
    for name, value in output.metrics.items():
        assert value.shape == () and value.isfinite() and not value.requires_grad, name
    if algorithm.loss.kind == "reverse":
        assert {name.split("/")[0] for name in output.metrics} >= {"trust"}


@distances
def test_the_loss_is_a_finite_number_with_a_gradient(algorithm, distance):
    """A second call gives the same bits. Mutation: a loss for each sample, or one that remembers
    calls.
    """
    samples = draw(distance)
    kept = copy.deepcopy(samples[:])
    before = algorithm.loss.state()
    output, gradient = output_of(algorithm, samples)
    assert output.loss.shape == () and output.loss.isfinite() and gradient.isfinite().all()
    again, same = output_of(algorithm, samples)
    assert torch.equal(again.loss, output.loss) and torch.equal(same, gradient)
    assert numbers(again) == numbers(output) and algorithm.loss.state() == before
    for name, value in vars(kept).items():
        assert torch.equal(getattr(samples, name), value), name


def plain_direction(algorithm, samples):
    """The gradient that raises the log-probability of each sample, to any scale.

    Of a rollout's step for reverse losses; for forward ones minus the flow-matching error's.
    """
    inputs = inputs_of(algorithm, samples)
    if algorithm.loss.kind == "reverse":
        objective = inputs.log_prob.sum()
    else:
        target = (inputs.x - inputs.x0) / inputs.sigma.view(-1, 1, 1, 1)
        objective = -(samples.velocity - target).square().sum()
    return torch.autograd.grad(objective, samples.velocity)[0]


def test_the_first_gradient_is_the_policy_gradient(algorithm):
    """At the rollout's weights it points along -A grad log p for every sample, and nothing is
    held back; twice the advantage is twice the gradient.

    Mutation: a flipped sign, a mask that drops what is equal, or an advantage that is squared.
    """
    output, gradient = output_of(algorithm, draw(0.0))
    raised = plain_direction(algorithm, draw(0.0))
    for row, advantage in enumerate(ADVANTAGES):
        wanted = -math.copysign(1.0, advantage) * raised[row].flatten()
        cosine = torch.cosine_similarity(gradient[row].flatten(), wanted, 0)
        assert cosine.item() == pytest.approx(1, abs=1e-9)
    masked = [value for name, value in numbers(output).items() if "/masked_" in name]
    assert not any(masked)
    half = tuple(value / 2 for value in ADVANTAGES)
    _, smaller = output_of(algorithm, draw(0.0, half))
    torch.testing.assert_close(gradient, 2 * smaller, rtol=1e-9, atol=1e-15)


def test_without_an_advantage_nothing_pulls_away_from_the_rollouts_policy(algorithm):
    """No gradient at its weights, and for a ratio's loss nowhere. Mutation: an offset to the
    advantage.
    """
    nothing = (0.0,) * 4
    _, gradient = output_of(algorithm, draw(0.0, nothing))
    assert gradient.abs().max() < 1e-15
    if algorithm.loss.kind == "reverse":
        output, gradient = output_of(algorithm, draw(FAR, nothing))
        assert output.loss == 0 and not gradient.any()


@distances
def test_the_order_of_samples_does_not_matter(algorithm, distance):
    """Their gradients change places with them. Mutation: a statistic of a neighbour."""
    samples = draw(distance)
    order = torch.tensor([2, 0, 3, 1])
    output, gradient = output_of(algorithm, samples)
    other, moved = output_of(algorithm, samples[order])
    torch.testing.assert_close(other.loss, output.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved, gradient[order], rtol=1e-10, atol=1e-15)
    assert numbers(other) == pytest.approx(numbers(output), rel=1e-6)


@distances
def test_micro_batches_add_up(algorithm, distance):
    """The loss and its metrics are means over samples. Mutation: a sum, or a mean over those that
    were kept.
    """
    samples = draw(distance)
    whole, gradient = output_of(algorithm, samples)
    pieces = [output_of(algorithm, samples[rows]) for rows in (slice(0, 1), slice(1, 4))]
    (first, left), (second, right) = pieces
    mean = 0.25 * first.loss + 0.75 * second.loss
    torch.testing.assert_close(mean, whole.loss, rtol=1e-12, atol=1e-14)
    together = torch.cat([0.25 * left, 0.75 * right])
    torch.testing.assert_close(together, gradient, rtol=1e-10, atol=1e-15)
    a, b = numbers(first), numbers(second)
    mixed = {name: 0.25 * a[name] + 0.75 * b[name] for name in a}
    assert mixed == pytest.approx(numbers(whole), rel=1e-6)


def test_advantages_are_clipped(algorithm):
    """Beyond the bound all count alike. Mutation: drop the clip, or clip one side."""
    bound = algorithm.loss.advantage_clip
    far = draw(NEAR, (3 * bound, -2 * bound, 1.0, -40 * bound))
    near = draw(NEAR, (bound, -bound, 1.0, -bound))
    (got, gradient), (expected, wanted) = (output_of(algorithm, s) for s in (far, near))
    assert torch.equal(got.loss, expected.loss) and torch.equal(gradient, wanted)


@pytest.mark.parametrize("value", [0.0, -5.0, math.nan])
def test_advantages_keep_their_sign(algorithm, value):
    """A bound of -5 would make every advantage -5, and 0 every one 0. Mutation: drop the check."""
    with pytest.raises(ValueError, match=f"loss.advantage_clip={value} must be a number above 0"):
        dataclasses.replace(algorithm.loss, advantage_clip=value)


@pytest.mark.parametrize("value", [-1e-4, math.nan])
def test_a_range_without_ratio_1_is_refused(algorithm, value):
    """None, or any on either side. Mutation: check one end only; a negative one clips everything,
    in silence.
    """
    for name in ("clip_low", "clip_high"):
        if hasattr(algorithm.loss, name):
            unbounded = {"clip_low": 0.0, "clip_high": math.inf, "advantage_clip": math.inf}
            dataclasses.replace(algorithm.loss, **unbounded)
            with pytest.raises(ValueError, match=f"loss.{name}={value:g} must be a number"):
                dataclasses.replace(algorithm.loss, **{name: value})


@pytest.mark.parametrize("broken", BROKEN)
@distances
def test_a_missing_sample_gives_no_gradient_and_spoils_nothing(algorithm, distance, broken):
    """Whatever its numbers are; it counts in the mean. Mutation: mask after the arithmetic, which
    gives 0 times infinity, or take the mean over the others.
    """
    samples, lost = draw(distance, (1.5, 0.0, 2.0, -3.0)), 1
    spoil = spoiled_forward if algorithm.loss.kind == "forward" else spoiled_reverse
    inputs, leaves = spoil(algorithm, samples, lost, broken)
    output = algorithm.loss(inputs)
    gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True)
    for gradient in gradients:
        if gradient is not None:
            assert gradient.isfinite().all() and not gradient[lost].any()
    others, _ = output_of(algorithm, samples[torch.tensor([0, 2, 3])])
    torch.testing.assert_close(output.loss, 0.75 * others.loss, rtol=1e-12, atol=1e-14)
    mean = {name: value.isfinite() for name, value in output.metrics.items()}
    assert all(mean.values()), mean


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_not_used_is_zero_before_a_loss_computes(broken):
    """Every tensor of it, and nothing else, so that a loss of one's own needs no mask. Mutation:
    leave one of them as it is.
    """
    algorithm = method("nft")
    spoiled, _ = spoiled_forward(algorithm, draw(0.1), 1, broken)
    used = keep_used(spoiled)
    others = torch.tensor([0, 2, 3])
    for name in ("x0", "x", "velocity", "old_velocity", "advantage"):
        assert not getattr(used, name)[1].any(), name
        assert torch.equal(getattr(used, name)[others], getattr(spoiled, name)[others])


@pytest.mark.parametrize("broken", BROKEN)
def test_the_distance_from_the_old_policy_leaves_out_what_is_broken(broken):
    """A sample that is not used counts as 0 where its distance is no number, and as it is where it
    is one. Mutation: let it make the metric infinite, or leave out every sample that is not used.
    """
    algorithm = method("nft")
    samples = draw(0.1)
    is_used = torch.arange(len(samples.x0)) != 1
    inputs = inputs_of(algorithm, samples, is_used)
    each = (inputs.velocity - inputs.old_velocity).detach().square().mean((1, 2, 3))
    assert velocity_distance(inputs).item() == pytest.approx(each.mean().item())
    velocity = inputs.velocity.detach().clone()
    velocity[1] = broken
    found = velocity_distance(dataclasses.replace(inputs, velocity=velocity))
    assert found.item() == pytest.approx((each.sum() - each[1]).item() / len(each))


def spoiled_forward(algorithm, samples, lost, broken):
    """Inputs where all tensors of a sample that is not used are broken, and the leaf."""
    is_used = torch.arange(len(samples.x0)) != lost
    inputs = inputs_of(algorithm, samples, is_used)
    changes = {}
    for name in ("x0", "x", "velocity", "old_velocity", "advantage"):
        changes[name] = getattr(inputs, name).detach().clone()
        changes[name][lost] = broken
    velocity = changes["velocity"].requires_grad_()
    return dataclasses.replace(inputs, **changes), [velocity]


def spoiled_reverse(algorithm, samples, lost, broken):
    """Inputs where the step of a sample without an advantage is broken, and the leaves."""
    inputs = inputs_of(algorithm, samples)
    changes = {}
    for name in ("log_prob", "old_log_prob", "kl", "tv", "velocity_change"):
        changes[name] = getattr(inputs, name).detach().clone()
    for name in ("log_prob", "kl", "tv", "velocity_change"):
        changes[name][lost] = broken
    leaves = [changes[name].requires_grad_() for name in ("log_prob", "kl")]
    return dataclasses.replace(inputs, **changes), leaves


@distances
def test_float32_is_enough(algorithm, distance):
    """It computes in the dtype of its inputs. Mutation: a constant that makes all of it float64,
    or a difference of large numbers.
    """
    output, gradient = output_of(algorithm, draw(distance, dtype=torch.float32))
    exact, wanted = output_of(algorithm, draw(distance))
    assert output.loss.dtype == gradient.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=1e-3, abs=1e-5)
    scale = wanted.abs().max().item()
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-2, atol=1e-3 * scale)


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
