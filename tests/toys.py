"""A toy pipeline of diffusers' kind, of two numbers a state, and how a model is derived from it."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn

from flowrl.models.derived import adapter
from flowrl.models.derived.adapter import Derived


class Typed(nn.Module):
    """A network with a dtype, as diffusers' and transformers' have one."""

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    @property
    def device(self):
        return next(self.parameters()).device


class Network(Typed):
    """v = W x + text, and a little of the time."""

    config = SimpleNamespace(in_channels=2)

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.proj.weight.copy_(torch.tensor([[0.5, -0.25], [0.125, 0.75]]))

    def forward(self, hidden_states, timestep, text):
        assert hidden_states.dtype == self.dtype
        time = (timestep / 1000).to(self.dtype)[:, None]
        return (self.proj(hidden_states) + text.to(self.dtype) * (1 + time),)


class Coder(Typed):
    """Its pictures are half its latents."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def decode(self, z):
        assert z.dtype == self.dtype
        return (self.scale * z,)


class Words(Typed):
    """Embeds a text by its length and its number of spaces."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Parameter(torch.tensor(0.125))

    def forward(self, texts):
        counts = torch.tensor([[len(text), text.count(" ")] for text in texts])
        return self.unit * counts


class ToyPipeline(DiffusionPipeline):
    """Steps a state of two numbers; what a test changes, a subclass overrides."""

    def __init__(self, transformer, vae, scheduler, text_encoder):
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder
        )

    def encode_prompt(self, prompt, device=None):
        return self.text_encoder(prompt)

    def prepare_latents(self, count, generator, latents=None):
        if latents is not None:
            return latents
        return torch.randn(count, 2, generator=generator).to(self.transformer.dtype)

    def predict(self, x, t, text, negative, scale):
        time = t.expand(len(x))
        velocity = self.transformer(x, time, text)[0]
        if negative is None:
            return velocity
        without = self.transformer(x, time, negative)[0]
        return without + scale * (velocity - without)

    def step(self, velocity, t, x):
        return self.scheduler.step(velocity, t, x, return_dict=False)[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        negative_prompt=None,
        num_inference_steps=5,
        guidance_scale=3.0,
        height=8,
        generator=None,
        latents=None,
        output_type="pt",
        return_dict=True,
    ):
        text = self.encode_prompt(prompt, device=self._execution_device)
        negative = None
        if guidance_scale > 1:
            negative = self.encode_prompt(negative_prompt)
        x = self.prepare_latents(len(prompt), generator, latents)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.step(self.predict(x, t, text, negative, guidance_scale), t, x)
        image = self.vae.decode(x)[0]
        channels = torch.cat([image, image[:, :1]], 1)
        return (channels[:, :, None, None].expand(-1, -1, 2, 4).clamp(0, 1),)


def toy(kind=ToyPipeline, scheduler=None):
    """A pipeline of one of the toy classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
        return kind(Network(), Coder(), scheduler, Words())


def derive(monkeypatch, kind=ToyPipeline, scheduler=None, call=None, **options):
    """The model derived from a toy, as if it lay in a folder."""
    pipeline = toy(kind, scheduler)

    def load(source, **components):
        copy = kind(**(pipeline.components | components))
        copy.set_progress_bar_config(disable=True)
        return copy.to(adapter.DTYPES[source.dtype])

    index = {"_class_name": "ToyPipeline", "text_encoder": ["transformers", "Words"]}
    monkeypatch.setattr(diffusers, "ToyPipeline", kind, raising=False)
    monkeypatch.setattr(adapter, "resolve", lambda name: name)
    monkeypatch.setattr(adapter, "read_index", lambda *_: index)
    monkeypatch.setattr(adapter.Source, "load", load)
    monkeypatch.setattr(adapter.Source, "identity", lambda *_: "toy")
    settings = {
        "pretrained": "toys/toy",
        "revision": None,
        "dtype": "float32",
        "without": [],
        "guidance": None,
        "has_guidance": True,
        "channels_last": False,
    }
    return Derived(call=call, **(settings | options))
