"""What `model=derived` cannot train is refused in one line with its reason, on a toy pipeline; and
what it can is the toy's own arithmetic.
"""

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from toys import ToyPipeline, derive

from flowrl.errors import UserError
from flowrl.models.derived.arguments import use_of
from flowrl.models.derived.standin import flow_settings
from flowrl.models.derived.times import Times
from flowrl.training.parity import ParityError, check
from flowrl.training.parity_errors import replay_error, velocity_errors
from flowrl.types import Conditioning

PROMPTS = ["a red cube", "two"]


def checked(model, scales=(1.0, 3.0), steps=4):
    """Check a derived toy, all of whose weights are trained."""
    trained = dict(model.transformer.requires_grad_(True).named_parameters())
    rows = model.encode_prompts(PROMPTS)
    return check(model, rows, trained, scales=scales, num_steps=steps, seed=0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_velocity_is_the_networks_own_guided_by_the_scale(scale, monkeypatch):
    """W x + (1 + sigma) (text_0 + scale (text - text_0)), by hand; "" embeds to zeros.

    Mutations: hand the default scale to the call, give rows each other's texts, or sigma for the
    timestep.
    """
    model = derive(monkeypatch)
    conditioning = model.encode_prompts(PROMPTS)
    x = torch.tensor([[1.0, 2.0], [-4.0, 8.0]])
    velocity = model.velocity(x, 0.25, conditioning, scale)
    # Lengths and spaces in units of an eighth: "a red cube" has 10 and 2, "two" 3 and 0.
    text = torch.tensor([[10.0, 2.0], [3.0, 0.0]]) / 8
    moved = torch.tensor([[0.5 - 0.5, 0.125 + 1.5], [-2.0 - 2.0, -0.5 + 6.0]])
    expected = moved + scale * 1.25 * text
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)


def test_pictures_are_decoded_without_a_step(monkeypatch):
    """Half of each number, in [0, 1]. Mutation: decode after one step."""
    model = derive(monkeypatch)
    images = model.decode(torch.tensor([[1.0, 0.5], [3.0, -1.0]]))
    assert images.shape == (2, 3, 2, 4)
    assert images[:, :, 0, 0].tolist() == [[0.5, 0.25, 0.5], [1.0, 0.0, 1.0]]


def test_the_grid_is_the_pipelines_own(monkeypatch):
    """Shift 3 of diffusers' default values, which are 1 and s(1/1000) for two steps.

    Mutation: give the grid of another number of steps.
    """
    first, second, last = derive(monkeypatch).grid(2)
    smallest = 0.003 / 1.002
    assert (first, last) == (1.0, 0.0)
    assert second == pytest.approx(3 * smallest / (1 + 2 * smallest), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_toy_passes_the_check(dtype, monkeypatch):
    """Mutation: compare the last state with the first."""
    for measured in checked(derive(monkeypatch, dtype=dtype)):
        assert measured.velocity <= (0 if dtype == "float32" else 0.02)
        assert measured.replay == 0
        assert (measured.has_gradient, measured.num_trained) == (1, 1)
        assert measured.num_steps == 4


class Rounds(ToyPipeline):
    def predict(self, x, t, *args):
        velocity = super().predict(x, t, *args)
        return velocity + t.to(x.dtype).float().sin().to(velocity.dtype)


def test_a_timestep_is_rounded_as_the_stock_pipeline_rounds_it(monkeypatch):
    """602 is 604 in bfloat16, whose sine differs by 1.6. Mutation: compare at float32 states."""
    model = derive(monkeypatch, Rounds, dtype="bfloat16")
    row = model.encode_prompts(PROMPTS[:1])
    stock = model.sample_stock(row, 1.0, 4, seed=0)
    assert max(velocity_errors(model, row, 1.0, stock, model.grid(4))) <= 0.01


class Copies(ToyPipeline):
    def predict(self, *args):
        copy.deepcopy(self.scheduler)
        return super().predict(*args)


class StepsTwice(ToyPipeline):
    def step(self, velocity, t, x):
        middle = super().step(velocity, t, x)
        self.scheduler._step_index -= 1
        return super().step(velocity, t, middle)


class NeverSteps(ToyPipeline):
    def step(self, velocity, t, x):
        return x - velocity


class Cuts(ToyPipeline):
    """Keeps the first number of its state from the step."""

    def step(self, velocity, t, x):
        return torch.cat([x[:, :1], super().step(velocity[:, 1:], t, x[:, 1:])], 1)


class Remembers(ToyPipeline):
    momentum = 0.0

    def predict(self, *args):
        self.momentum = 0.5 * self.momentum + super().predict(*args)
        return self.momentum


class RemembersSteps(ToyPipeline):
    """Remembers the steps of a call, as some guidance does, and no earlier call."""

    def predict(self, x, t, *args):
        if t == self.scheduler.timesteps[0]:
            self.momentum = 0.0
        self.momentum = 0.5 * self.momentum + super().predict(x, t, *args)
        return self.momentum


class CountsSteps(ToyPipeline):
    """Does otherwise at its first step, whatever came before."""

    def predict(self, x, t, *args):
        velocity = super().predict(x, t, *args)
        return velocity if t == self.scheduler.timesteps[0] else 2 * velocity


class Discrete(ToyPipeline):
    def prepare_latents(self, count, generator, latents=None):
        return torch.zeros(count, 2, dtype=torch.long)


class TwoStates(ToyPipeline):
    def encode_prompt(self, prompt, device=None):
        self.prepare_latents(len(prompt), None)
        return super().encode_prompt(prompt)


class WithoutPrompt(ToyPipeline):
    def __call__(self, class_labels=None, num_inference_steps=5):
        return None


class MixesRows(ToyPipeline):
    def predict(self, x, *args):
        return super().predict(x, *args) + x.mean(0)


class Detached(ToyPipeline):
    def predict(self, *args):
        with torch.no_grad():
            return super().predict(*args)


class Packs(ToyPipeline):
    def encode_prompt(self, prompt, device=None):
        return super().encode_prompt(prompt).flatten()


AT_ONCE = {
    "two states a step": (Copies, "copies its scheduler"),
    "no step": (NeverSteps, "ends without a step"),
    "a state cut before the step": (Cuts, "cut or changed before the step"),
    "a discrete flow": (Discrete, "no tensor of real numbers"),
    "no prompt": (WithoutPrompt, "takes no prompt"),
    "texts without rows": (Packs, "no axis is the rows'"),
    "several prepared states": (TwoStates, "prepare_latents 3 times"),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_a_pipeline_that_cannot_be_derived_from_is_refused(case, monkeypatch):
    """In one line that begins with the key. Mutations: let the scheduler be copied, take the first
    of two states, or a state of whole numbers.
    """
    kind, reason = AT_ONCE[case]
    with pytest.raises(UserError) as error:
        model = derive(monkeypatch, kind)
        model.velocity(torch.ones(1, 2), 0.5, model.encode_prompts(PROMPTS[:1]), 3.0)
    text = str(error.value)
    assert text.startswith("model.pretrained=toys/toy: a "), text
    assert reason in text and "\n" not in text


CHECKED = {
    "a state cut before the step": (Cuts, UserError, "its state is (1, 2), but its scheduler"),
    "two steps an iteration": (StepsTwice, UserError, "steps 8 times where it was asked for 4"),
    "guidance with memory": (Remembers, ParityError, "which its guidance remembers"),
    "guidance with memory of a call": (
        RemembersSteps,
        ParityError,
        "a state that other steps led to, which its guidance remembers, differs from its own",
    ),
    "guidance by the step": (
        CountsSteps,
        ParityError,
        "velocity at the stock pipeline's own states differs from the stock pipeline's",
    ),
    "rows that mix": (MixesRows, ParityError, "a sample beside others differs from one alone"),
    "no gradient": (Detached, ParityError, "does not depend on the trained weights"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_the_check_refuses(case, monkeypatch):
    """Mutations: compare rows with themselves, count no steps, or skip the gradient."""
    kind, error_kind, reason = CHECKED[case]
    model = derive(monkeypatch, kind)
    with pytest.raises(error_kind) as error:
        checked(model)
    assert reason in str(error.value) and "\n" not in str(error.value)


class LosesMask(ToyPipeline):
    """Gives another velocity where its network is recomputed."""

    def predict(self, *args):
        velocity = super().predict(*args)
        return 1.5 * velocity if self.is_recomputed() else velocity

    def is_recomputed(self):
        is_on = getattr(self.transformer, "is_gradient_checkpointing", False)
        return is_on and torch.is_grad_enabled()


class TakesFewer(LosesMask):
    """Fails where its network is recomputed."""

    def predict(self, *args):
        if self.is_recomputed():
            raise TypeError("forward() takes 3 arguments but 4 were given")
        return super().predict(*args)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LosesMask, "the velocity differs by 0.5 from the one of rollouts; set it to false"),
        (TakesFewer, "its call fails (TypeError: forward() takes 3 arguments but 4 were given); "),
    ],
)
def test_checkpointing_that_changes_the_network_is_refused(kind, reason, monkeypatch):
    """By its key, with the remedy; without it all is well. Mutations: look at no network, or
    compare what is recomputed with itself.
    """
    model = derive(monkeypatch, kind)
    checked(model)
    model.transformer.is_gradient_checkpointing = True
    with pytest.raises(ParityError) as error:
        checked(model)
    text = str(error.value)
    head = "model.pretrained=toys/toy: backend.gradient_checkpointing=true is not for a "
    assert text.startswith(head) and reason in text and "\n" not in text


class NeedsPicture(ToyPipeline):
    """Cannot be called without a picture, though its signature has a default for it."""

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        prompt=None,
        negative_prompt=None,
        num_inference_steps=5,
        guidance_scale=3.0,
    ):
        assert image.size
        return super().__call__(prompt, negative_prompt, num_inference_steps, guidance_scale)


class NeedsMore(NeedsPicture):
    def prepare_latents(self, count, generator, latents=None):
        raise ValueError("and a mask")


def test_a_pipeline_that_needs_a_picture_is_found_to_use_one_always(monkeypatch):
    """Mutation: go by its signature."""
    assert use_of(NeedsPicture) == "sometimes"
    model = derive(monkeypatch, NeedsPicture)
    assert model.use == "always"
    assert len(model.encode_edits(PROMPTS, [Image.new("RGB", (8, 8))] * 2)) == 2


def test_a_pipeline_that_a_picture_does_not_serve_says_both(monkeypatch):
    """Mutation: tell one failure alone."""
    with pytest.raises(UserError) as error:
        derive(monkeypatch, NeedsMore)
    first, second = str(error.value).split("; and with one ")
    assert "it does not do without a picture: its call fails (AttributeError: " in first
    assert second == "its call fails (ValueError: and a mask)"


class Momentum:
    """A guidance that remembers the state before, at first `last`."""

    def __init__(self, last):
        self.last = last

    def velocity(self, x, sigma, conditioning, scale):
        velocity = x + 0.5 * self.last
        self.last = x
        return velocity


def test_memory_is_found_by_replay(monkeypatch):
    """1.5 x after x itself, 0.5 x after another state -x: a difference of two thirds.

    Mutation: evaluate no other state between.
    """
    x = torch.tensor([[1.0, 2.0]])
    model = derive(monkeypatch)
    monkeypatch.setattr(model, "velocity", Momentum(last=x).velocity)
    error = replay_error(model, Conditioning({"row": x}), 3.0, x, 0.5)
    assert error == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler is no scheduler of a rectified flow"),
        (None, "it has no scheduler"),
    ],
)
def test_a_scheduler_of_another_kind_of_model_is_refused(scheduler, reason, monkeypatch):
    """EDM's preconditioning among them. Mutation: exchange any scheduler for Euler's."""
    with pytest.raises(UserError, match=reason):
        flow_settings(scheduler)


@pytest.mark.parametrize(
    ("call", "options", "parts"),
    [
        ({"heigth": 8}, {}, ("model.call.heigth=8", "did you mean 'height'?")),
        ({"guidance_scale": 3}, {}, ("model.call.guidance_scale=3", "rollout.guidance_scale")),
        ({"num_inference_steps": 3}, {}, ("num_inference_steps=3", "rollout.num_steps")),
        ({"prompt": "x"}, {}, ("model.call.prompt=", "data and evaluation")),
        (None, {"guidance": "strength"}, ("model.guidance=strength", "guidance_scale")),
        (None, {"without": ["unet"]}, ("model.without", "unet", "text_encoder")),
    ],
)
def test_what_the_call_does_not_take_is_named(call, options, parts, monkeypatch):
    """Mutation: pass on what the call does not know."""
    with pytest.raises(UserError) as error:
        derive(monkeypatch, call=call, **options)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_guidance_needs_its_key(monkeypatch):
    """Mutation: ignore the scale."""
    model = derive(monkeypatch, has_guidance=False)
    rows = model.encode_prompts(PROMPTS)
    assert [name for name in rows.tensors if name.startswith("encode_prompt.1")] == []
    with pytest.raises(UserError, match=r"needs model.has_guidance=true"):
        model.velocity(torch.ones(2, 2), 0.5, rows, 3.0)


def test_sigmas_above_one_are_no_rectified_flows():
    """EDM's begin at 80. Mutation: look at the last one alone."""
    with pytest.raises(UserError, match=r"its sigmas go from 80 to 0.5"):
        Times([80.0, 0.5], torch.tensor([1000.0, 6.25]), 1000)


class Fails(ToyPipeline):
    def predict(self, *args):
        super().predict(*args)
        raise RuntimeError("The size of tensor a (3) must match\nthe size of tensor b (2)")


def test_what_a_pipelines_own_code_raises_is_told_in_a_line(monkeypatch):
    """Mutation: let the traceback through."""
    model = derive(monkeypatch, Fails)
    with pytest.raises(UserError, match=r"its call fails \(RuntimeError: The size .* match\)$"):
        check(model, model.encode_prompts(PROMPTS), {}, scales=[1.0], num_steps=2, seed=0)
