"""The measure of drift in evaluations: what it costs, and where there is none."""

import pytest
import torch
from runs import awake, make

from flowrl.errors import UserError
from flowrl.prompts.subsets import chosen
from flowrl.samplers.ode import ODE
from flowrl.samplers.sde import FlowSDE


def test_drift_is_measured_in_batches():
    """Four samples in batches of three and one: no pass is larger, and the mean is that over
    samples.

    Mutation: all samples at once, whatever evaluation.batch_size; or the mean of the batches'
    means.
    """
    policy, _, evaluator = make("evaluation.num_steps=4")
    awake(policy)
    prompts, sizes, velocity = evaluator.prompts[:6], [], policy.model.velocity

    def counted(x, *rest):
        sizes.append(len(x))
        return velocity(x, *rest)

    policy.model.velocity = counted
    whole = evaluator.kl_to_reference(policy, prompts)
    assert set(sizes) == {evaluator.kl_samples} == {4}
    sizes.clear()
    evaluator.batch_size = 3
    assert evaluator.kl_to_reference(policy, prompts) == pytest.approx(whole, rel=1e-4) != 0
    assert sorted(set(sizes)) == [1, 3]


def test_drift_is_measured_over_the_whole_set():
    """Four samples of fourteen, one from each stretch, with the prompts and the noise of their
    rows.

    Mutation: the first four, which are of a file's first families; or their noise.
    """
    policy, _, evaluator = make("evaluation.num_steps=2", "evaluation.subset=even")
    prompts = [prompt for prompt in evaluator.sets["held_in"] for _ in range(2)]
    rows, drawn, velocity = chosen(14, 4, "even"), [], policy.model.velocity
    assert len(prompts) == 14 and evaluator.kl_samples == 4 and rows != [0, 1, 2, 3]

    def recorded(x, *rest):
        drawn.append(x)
        return velocity(x, *rest)

    policy.model.velocity = recorded
    embedded, embed = [], policy.embed
    policy.embed = lambda batch: embedded.extend(batch) or embed(batch)
    evaluator.kl_to_reference(policy, prompts)
    assert torch.equal(drawn[0], evaluator.initial_noise(policy, 14)[rows])
    assert embedded == [prompts[row] for row in rows]


@pytest.mark.parametrize(
    "change", [{"kl_samples": 0}, {"sampler": ODE()}, {"sampler": FlowSDE(noise_level=0.0)}]
)
def test_drift_that_is_not_measured_is_left_out(change):
    """Without samples, or without a stochastic step. Mutation: log 0, which reads as the reference
    itself.
    """
    policy, _, evaluator = make("evaluation.num_steps=2", "evaluation.max_prompts=1")
    for name, value in change.items():
        setattr(evaluator, name, value)
    metrics = evaluator.evaluate(awake(policy)).metrics
    assert "eval/held_in/reward" in metrics and not [name for name in metrics if "kl_ref" in name]


def test_a_negative_number_of_samples_is_refused():
    """Mutation: let Python count from the set's end."""
    with pytest.raises(
        UserError, match=r"evaluation\.kl_samples=-1 must be a whole number of at least 0"
    ):
        make("evaluation.kl_samples=-1")


SMALL = ("evaluation.num_steps=2", "evaluation.max_prompts=3", "evaluation.images_per_prompt=2")


def test_only_the_images_that_are_asked_for_are_kept():
    """Copies, and the numbers are those of all. Mutation: keep all, or views of whole batches."""
    policy, _, evaluator = make(*SMALL, "evaluation.batch_size=4", "evaluation.kl_samples=0")
    whole = evaluator.evaluate(policy)
    some = evaluator.evaluate(policy, kept={"held_in": [0, 4]})
    assert some.metrics == whole.metrics
    assert {name: list(images) for name, images in some.images.items()} == {
        name: [0, 4] if name == "held_in" else [] for name in evaluator.sets
    }
    for row, image in some.images["held_in"].items():
        assert torch.equal(image, whole.images["held_in"][row])
        assert image.untyped_storage().nbytes() == image.nbytes


def test_clips_are_scored_by_the_frames_that_count_and_measured_in_all():
    """A model whose clips have three frames: what it drew, its mirror image, and a darker one.
    Rewards see the first and the last.

    Mutation: score the mean, or measure the first frame.
    """
    settings = ("frames.count=2", "frames.reduce=min", "evaluation.kl_samples=0")
    policy, _, evaluator = make(*SMALL, *settings)
    decode = policy.model.decode
    drawn = []

    def clips(x):
        images = decode(x)
        drawn.append(torch.stack([images, images.flip(-1), 0.5 * images], 1))
        return drawn[-1]

    policy.model.decode = clips
    result = evaluator.evaluate(policy)
    name = next(iter(evaluator.sets))
    prompts = [prompt for prompt in evaluator.sets[name] for _ in range(2)]
    ours = drawn[0]
    assert ours.shape[:3] == (len(prompts), 3, 3)
    ends = [policy.reward.score(ours[:, number], prompts).values for number in (0, 2)]
    metrics = {key.removeprefix(f"eval/{name}/"): value for key, value in result.metrics.items()}
    assert metrics["reward"] == pytest.approx(float(torch.minimum(*ends).mean()), abs=1e-6)
    first = (ours[:, 1] - ours[:, 0]).abs().mean((1, 2, 3))
    second = (ours[:, 2] - ours[:, 1]).abs().mean((1, 2, 3))
    assert metrics["panel/motion"] == pytest.approx(float((first + second).mean() / 2), rel=1e-5)
    assert metrics["panel/brightness"] < 0.9 * float(ours[:, 0].mean())
    assert result.images[name][1].shape == ours.shape[1:]
