"""The flow-matching loss on real images beside an update's own, on a policy of one weight."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from flowrl.errors import UserError
from flowrl.images.captioned import CaptionedImage
from flowrl.noise import gaussian_noise
from flowrl.schedule import LinearShift, intervals
from flowrl.training import data_regularizer
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.data_regularizer import DataRegularizer, trained_steps
from flowrl.training.metric_means import Record
from flowrl.types import Conditioning

GRID = intervals(LinearShift(shift=1.0), 4)
"""From 1 in steps of a quarter."""
SHAPE = (1, 2, 2)
STEP = 1 << 56
"""The step of the first noise that real images are given, as docs say."""


class Model:
    """Its latents are the red of each 2x2 image in [0, 1], and its velocity is its weight."""

    image_size = (2, 2)
    latent_shape = SHAPE
    pipeline = transformer = vae = conditioning_shapes = conditioning_dtypes = None
    negative_prompt = embedding_key = None
    # What is not asked for here.
    encode_prompts = truncated_part = drop_text_encoders = to = decode = staticmethod(print)

    def __init__(self):
        self.weight = torch.tensor(0.5, requires_grad=True)
        self.asked = []
        self.num_encoded = 0

    def velocity(self, x, sigma, conditioning, guidance_scale):
        captions = conditioning.tensors["text"].flatten().tolist()
        self.asked.append((x, sigma, captions, guidance_scale))
        return self.weight.expand_as(x)

    def encode_images(self, images):
        self.num_encoded += len(images)
        return images[:, :1]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """No process waits for another one's gradients: they meet in an update's own last term."""

    def synchronised(policy, is_last):
        assert not is_last
        return nullcontext()

    monkeypatch.setattr(data_regularizer, "synchronised", synchronised)


def images(count, size=(2, 2)):
    """Images of one level each, 10 times their number, which is their caption too."""

    def image(number):
        return Image.new("RGB", size[::-1], (10 * number, 0, 0))

    return [CaptionedImage(str(k), f"{k}.png", size, lambda k=k: image(k)) for k in range(count)]


def policy_of(update=0, rank=0, processes=1, micro_batch=8, kind="reverse", num_trained=2):
    """A policy that is about to make an update, of 2 an iteration, whose second prompt has other
    stochastic steps than its first one.
    """
    plan = BatchPlan(
        prompts_per_iteration=2,
        group_size=8,
        updates_per_iteration=2,
        inner_epochs=3,
        max_micro_batch=micro_batch,
        num_processes=processes,
    )
    return SimpleNamespace(
        algorithm=SimpleNamespace(
            intervals=GRID, num_steps=len(GRID), loss=SimpleNamespace(kind=kind)
        ),
        objective=SimpleNamespace(
            stochastic_steps=lambda iteration, prompt: ((0, 1), (2, 3))[prompt],
            kept_steps=lambda stochastic, iteration: stochastic,
            num_trained=lambda: num_trained,
        ),
        model=Model(),
        embed=lambda prompts: Conditioning(
            {"text": torch.tensor([[float(prompt.text)] for prompt in prompts])}
        ),
        plan=plan,
        seed=7,
        num_iterations=update // 2,
        num_optimizer_steps=update,
        global_rank=rank,
        device=torch.device("cpu"),
        manual_backward=lambda loss: loss.backward(),
    )


def regularizer(count=6, weight=0.25, batch=4):
    return DataRegularizer(images=images(count), weight=weight, batch=batch, guidance_scale=1.5)


def gradient(policy, subject, record=None):
    subject.add_gradients(policy, Record() if record is None else record)
    return policy.model.weight.grad.item()


def noise_of(update, places):
    return gaussian_noise(
        SHAPE,
        seed=7,
        iteration=update // 2,
        samples=[(0, place) for place in places],
        step=STEP + update,
    )


def test_loss_and_gradient_by_hand():
    """Of v = w the loss is mean (w - u)^2 with u = eps - x0, whatever sigma, and its gradient
    2 (w - mean u). Mutations: leave out the weight or x0, turn a sign, or sum over sigmas.
    """
    policy, subject, record = policy_of(update=3), regularizer(), Record()
    found = gradient(policy, subject, record)
    asked = policy.model.asked
    captions = asked[0][2]
    x0 = torch.tensor(captions)[:, None, None, None] * 10 / 255
    target = noise_of(3, range(4)) - x0
    assert found == pytest.approx(0.25 * 2 * (0.5 - target.mean().item()), rel=1e-5)
    expected = (0.5 - target).square().mean().item()
    assert record.means()["loss/data"] == pytest.approx(expected, rel=1e-5)


def test_images_are_noised_to_the_sigmas_of_a_prompts_rollouts():
    """One noise for all of them, and the guidance scale is its own. Mutations: take data for
    noise, another scale, or another noise for each sigma.
    """
    updates = [policy_of(update=update) for update in range(12)]
    for update, policy in enumerate(updates):
        gradient(policy, regularizer())
        first, second = policy.model.asked
        assert (first[1], second[1]) in ((1.0, 0.75), (0.5, 0.25))
        x0 = torch.tensor(first[2])[:, None, None, None] * 10 / 255
        for x, sigma, captions, scale in (first, second):
            noised = (1 - sigma) * x0 + sigma * noise_of(update, range(4))
            assert captions == first[2] and scale == 1.5
            torch.testing.assert_close(x, noised.expand_as(x), rtol=1e-5, atol=1e-6)
    # Both prompts have their turn.
    assert len({policy.model.asked[0][1] for policy in updates}) == 2


def test_losses_on_noised_samples_take_any_sigma():
    """As many as each sample trains on, and at most those there are. Mutation: take the first."""
    draws = [trained_steps(policy_of(update=k, kind="forward")) for k in range(20)]
    assert all(len(set(steps)) == 2 and steps == sorted(steps) for steps in draws)
    assert {step for steps in draws for step in steps} == {0, 1, 2, 3}
    assert trained_steps(policy_of(kind="direct", num_trained=9)) == [0, 1, 2, 3]


def test_each_image_comes_once_before_one_comes_again():
    """Six images in updates of four: twelve places are two passes, in orders of their own, and an
    update's images do not depend on those before it, as in a resumed run.

    Mutations: begin every update with the first image, or shuffle each pass alike.
    """
    captions = []
    subject = regularizer()
    for update in range(3):
        policy = policy_of(update=update)
        gradient(policy, subject)
        captions += policy.model.asked[0][2]
        fresh = policy_of(update=update)
        gradient(fresh, regularizer())
        assert fresh.model.asked[0][2] == policy.model.asked[0][2]
    assert sorted(captions[:6]) == sorted(captions[6:]) == [0, 1, 2, 3, 4, 5]
    assert captions[:6] != captions[6:]


def test_processes_and_micro_batches_change_nothing():
    """Two processes, whose gradients are averaged, make one's. Mutations: give each process all of
    the images or the first ones, or weigh a micro-batch alike whatever its size.
    """
    alone = policy_of(update=1)
    expected = gradient(alone, regularizer(batch=6))
    shares = [policy_of(update=1, rank=rank, processes=2, micro_batch=2) for rank in (0, 1)]
    found = [gradient(policy, regularizer(batch=6)) for policy in shares]
    assert sum(found) / 2 == pytest.approx(expected, rel=1e-5)
    # Three images of each process, as two and one.
    assert [len(x) for x, *_ in shares[0].model.asked] == [2, 2, 1, 1]
    seen = [policy.model.asked[0][2] + policy.model.asked[2][2] for policy in shares]
    assert seen[0] + seen[1] == alone.model.asked[0][2]


def test_images_are_encoded_once():
    """Mutation: encode them in every update."""
    subject, policy = regularizer(count=3), policy_of()
    for update in range(4):
        policy.num_optimizer_steps = update
        gradient(policy, subject)
    assert policy.model.num_encoded == 3


def test_a_rehearsal_counts_the_passes_of_an_iteration():
    """Two updates, three inner epochs, two micro-batches and two sigmas. Mutation: forget one."""
    policy = policy_of(micro_batch=2)
    assert regularizer().rehearse(policy) == 2 * 3 * 2 * 2
    assert len(policy.model.asked) == 1 and policy.model.weight.grad is not None


def test_what_is_refused():
    """Mutation: take either."""
    with pytest.raises(UserError, match=r"regularizer.batch=4 images do not split over 3 proc"):
        regularizer().require_processes(3)
    regularizer().require_processes(2)
    regularizer().require_size(2, 2)
    for height, width in ((3, 2), (2, 3)):
        with pytest.raises(UserError, match=r"0.png: 2 x 2 pixels are fewer than the model's"):
            regularizer().require_size(height, width)
    with pytest.raises(UserError, match=r"regularizer.weight=0 must be"):
        regularizer(weight=0)


def test_it_is_told_in_the_batch_plan():
    """Mutation: tell the weight."""
    line = "  data regularisation       4 of 6 images an update x 2 sigmas"
    assert regularizer().describe(2) == line
