"""What each loss of conf/loss keeps, whatever its formula: an option added there is tested too."""

import copy
import dataclasses
import math

import pytest
import torch
from each_loss import (
    ADVANTAGES,
    BY_RANK,
    FAR,
    GROUP_SIZE,
    NEAR,
    OPTIONS,
    Samples,
    distances,
    draw,
    inputs_of,
    numbers,
    output_of,
)

from flowrl.losses.protocol import DirectLoss, ForwardLoss, Loss, ReverseLoss
from flowrl.objectives import OBJECTIVES
from flowrl.objectives.declared import require_declared


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
    kinds = {"reverse": ReverseLoss, "forward": ForwardLoss, "direct": DirectLoss}
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
    if algorithm.loss.kind == "reverse" and algorithm.loss.needs_rewards:
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

    Of a rollout's step for reverse losses, or of what a pair pulls; for forward ones minus the
    flow-matching error's.
    """
    inputs = inputs_of(algorithm, samples)
    if algorithm.loss.kind == "reverse":
        compared = inputs.pair_log_ratio
        objective = (inputs.log_ratio if compared is None else compared).sum()
    else:
        target = (inputs.x - inputs.x0) / inputs.sigma.view(-1, 1, 1, 1)
        objective = -(samples.velocity - target).square().sum()
    return torch.autograd.grad(objective, samples.velocity)[0]


def test_the_first_gradient_is_the_policy_gradient(rewarded):
    """At the rollout's weights it points along -A grad log p for every sample, and nothing is
    held back; twice the advantage is twice the gradient, or the same for a loss that ranks.

    Mutation: a flipped sign, a mask that drops what is equal, or an advantage that is squared.
    """
    output, gradient = output_of(rewarded, draw(0.0))
    raised = plain_direction(rewarded, draw(0.0))
    for row, advantage in enumerate(ADVANTAGES):
        wanted = -math.copysign(1.0, advantage) * raised[row].flatten()
        cosine = torch.cosine_similarity(gradient[row].flatten(), wanted, 0)
        assert cosine.item() == pytest.approx(1, abs=1e-9)
    masked = [value for name, value in numbers(output).items() if "/masked_" in name]
    assert not any(masked)
    half = tuple(value / 2 for value in ADVANTAGES)
    _, smaller = output_of(rewarded, draw(0.0, half))
    factor = 1 if rewarded.loss.name in BY_RANK else 2
    torch.testing.assert_close(gradient, factor * smaller, rtol=1e-9, atol=1e-15)


def test_without_an_advantage_nothing_pulls_away_from_the_rollouts_policy(rewarded):
    """No gradient at its weights, and for a ratio's loss nowhere. Mutation: an offset to the
    advantage.
    """
    nothing = (0.0,) * 4
    _, gradient = output_of(rewarded, draw(0.0, nothing))
    assert gradient.abs().max() < 1e-15
    if rewarded.loss.kind == "reverse":
        output, gradient = output_of(rewarded, draw(FAR, nothing))
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
    """The loss and its metrics are means over samples; micro-batches of a loss that compares them
    hold whole groups. Mutation: a sum, or a mean over those that were kept.
    """
    samples = draw(distance)
    whole, gradient = output_of(algorithm, samples)
    cut = GROUP_SIZE if algorithm.loss.compares else 1
    pieces = [output_of(algorithm, samples[rows]) for rows in (slice(0, cut), slice(cut, 4))]
    (first, left), (second, right) = pieces
    part, rest = cut / 4, 1 - cut / 4
    mean = part * first.loss + rest * second.loss
    torch.testing.assert_close(mean, whole.loss, rtol=1e-12, atol=1e-14)
    together = torch.cat([part * left, rest * right])
    torch.testing.assert_close(together, gradient, rtol=1e-10, atol=1e-15)
    a, b = numbers(first), numbers(second)
    mixed = {name: part * a[name] + rest * b[name] for name in a}
    assert mixed == pytest.approx(numbers(whole), rel=1e-6)


def test_advantages_are_clipped(rewarded):
    """Beyond the bound all count alike. Mutation: drop the clip, or clip one side."""
    if rewarded.loss.name in BY_RANK:
        return
    bound = rewarded.loss.advantage_clip
    far = draw(NEAR, (3 * bound, -2 * bound, 1.0, -40 * bound))
    near = draw(NEAR, (bound, -bound, 1.0, -bound))
    (got, gradient), (expected, wanted) = (output_of(rewarded, s) for s in (far, near))
    assert torch.equal(got.loss, expected.loss) and torch.equal(gradient, wanted)


@pytest.mark.parametrize("value", [0.0, -5.0, math.nan])
def test_advantages_keep_their_sign(rewarded, value):
    """A bound of -5 would make every advantage -5, and 0 every one 0. Mutation: drop the check."""
    if rewarded.loss.name in BY_RANK:
        return
    with pytest.raises(ValueError, match=f"loss.advantage_clip={value} must be a number above 0"):
        dataclasses.replace(rewarded.loss, advantage_clip=value)


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
