"""The package against tensors that the published implementations gave for the same inputs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.advantages import gdpo, global_std, group
from flowrl.gaussian import Likelihood, tv
from flowrl.losses.dppo import DPPO
from flowrl.losses.grpo import GRPO
from flowrl.losses.guard import Guard
from flowrl.losses.nft import NFT
from flowrl.samplers.cps import CPS
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import Interval
from flowrl.types import ForwardInputs, LossInputs

GOLDENS = load_file(Path(__file__).parents[1] / "goldens" / "sd3_latents.safetensors")
BETAS = ("0.1", "1")
SAMPLERS = {"flow_sde": FlowSDE(noise_level=0.7), "cps": CPS(noise_level=0.8)}
INPUTS = (
    "sigmas",
    "step_index",
    "x",
    "x_next",
    "velocity",
    "old_velocity",
    "ref_velocity",
    "advantage",
)
TENSORS = (
    "x_next",
    "mean",
    "old_mean",
    "ref_mean",
    "std",
    "gaussian_log_prob",
    "old_gaussian_log_prob",
    "tv",
)
TENSORS += ("published_log_prob", "published_old_log_prob", "kl_mean", "kl_sum", "kl_ref_mean")
ADVANTAGES = {"adv.group_std": group, "adv.global_std": global_std, "adv.gdpo": gdpo}
CLIPS = {"flow_sde": ("0.001", "0.1"), "cps": ("0.001", "0.1")}
GUARDS = ("0.002", "0.1")
DELTAS = ("0.0001", "0.01", "1e+09")
GRADIENT = {"rtol": 1e-4, "atol": 1e-9}
by_sampler = pytest.mark.parametrize("name", SAMPLERS)


def close(actual, key, rtol=1e-5, atol=0.0):
    expected = GOLDENS[key].double()
    torch.testing.assert_close(
        actual.detach().double(), expected, rtol=rtol, atol=atol, msg=lambda m: f"{key}: {m}"
    )


class Steps:
    """The eight samples, each at its own step of the grid, in float64: per row a Gaussian step and
    its reductions.
    """

    def __init__(self, name):
        self.name, self.sampler = name, SAMPLERS[name]
        sigmas = GOLDENS["sigmas"].tolist()
        self.intervals = [
            Interval(sigmas[k], sigmas[k + 1], sigmas[1]) for k in GOLDENS["step_index"].tolist()
        ]
        self.velocity = GOLDENS["velocity"].double().requires_grad_()
        self.steps = self.at(self.velocity)
        self.old, self.ref = (
            self.at(GOLDENS[key].double()) for key in ("old_velocity", "ref_velocity")
        )
        self.x_next = GOLDENS[f"{name}.x_next"].double()

    def at(self, velocity):
        x = GOLDENS["x"].double()
        return [
            self.sampler.step(x[i : i + 1], velocity[i : i + 1], step)
            for i, step in enumerate(self.intervals)
        ]

    def log_prob(self, steps, form="gaussian"):
        likelihood = Likelihood(reduction="mean", form=form)
        return torch.cat(
            [likelihood.log_prob(step, self.x_next[i : i + 1]) for i, step in enumerate(steps)]
        )

    def log_ratio(self, form="gaussian"):
        likelihood = Likelihood(reduction="mean", form=form)
        pairs = enumerate(zip(self.steps, self.old, strict=True))
        return torch.cat(
            [
                likelihood.log_ratio(step, old.mean, self.x_next[i : i + 1])
                for i, (step, old) in pairs
            ]
        )

    def kl(self, others, reduction="mean"):
        likelihood = Likelihood(reduction=reduction, form="gaussian")
        return torch.cat(
            [
                likelihood.kl(step, other.mean)
                for step, other in zip(self.steps, others, strict=True)
            ]
        )

    def tv(self):
        return torch.cat(
            [tv(step, old.mean) for step, old in zip(self.steps, self.old, strict=True)]
        )

    def loss(self, function, form="gaussian"):
        kl, distance = self.kl(self.old).detach(), self.tv().detach()
        none = torch.zeros_like(kl)
        how = {"form": form, "reduction": "mean", "dimensions": 1}
        return function(
            LossInputs(
                self.log_ratio(form),
                GOLDENS["advantage"].double(),
                kl,
                distance,
                none,
                1.0,
                -0.1,
                **how,
            )
        )


@by_sampler
def test_steps_and_divergences(name):
    """Mutation: any coefficient of a mean, a factor in std, log_prob, KL or TV."""
    s = Steps(name)
    form = "unnormalised" if name == "cps" else "gaussian"
    for key, steps in (("mean", s.steps), ("old_mean", s.old), ("ref_mean", s.ref)):
        close(torch.cat([step.mean for step in steps]), f"{name}.{key}", atol=1e-6)
    close(torch.tensor([step.std for step in s.steps]), f"{name}.std")
    for key, steps in (("", s.steps), ("old_", s.old)):
        close(s.log_prob(steps), f"{name}.{key}gaussian_log_prob")
        close(s.log_prob(steps, form), f"{name}.published_{key}log_prob")
    close(s.kl(s.old), f"{name}.kl_mean")
    close(s.kl(s.old, "sum"), f"{name}.kl_sum")
    close(s.kl(s.ref), f"{name}.kl_ref_mean")
    close(s.tv(), f"{name}.tv")


@pytest.mark.parametrize(("name", "eps"), [(name, eps) for name in CLIPS for eps in CLIPS[name]])
def test_clipped_losses(name, eps):
    """Flow-GRPO, and Flow-CPS as published. Mutation: minimum for maximum, the other likelihood
    form.
    """
    s, bound = Steps(name), float(eps)
    form = "unnormalised" if name == "cps" else "gaussian"
    clipped = GRPO(clip_low=bound, clip_high=bound, advantage_clip=5.0, calibrated_for=form)
    loss = s.loss(clipped, form).loss
    loss.backward()
    close(loss.view(1), f"{name}.clip_{eps}.loss")
    close(s.velocity.grad, f"{name}.clip_{eps}.grad_velocity", **GRADIENT)


@pytest.mark.parametrize(
    ("name", "delta"), [(name, delta) for name in SAMPLERS for delta in DELTAS]
)
def test_dppo_losses(name, delta):
    """Mutation: mask one side only, a KL with another std, dropped terms left out of the mean."""
    s = Steps(name)
    masked = DPPO(
        delta=float(delta),
        final_delta=None,
        kl_budget=None,
        divergence="kl",
        calibrated_for="kl",
        advantage_clip=5.0,
    )
    output = s.loss(masked)
    output.loss.backward()
    close(output.loss.view(1), f"{name}.dppo_{delta}.loss")
    close(output.metrics["trust/masked_fraction"].view(1), f"{name}.dppo_{delta}.masked")
    close(s.velocity.grad, f"{name}.dppo_{delta}.grad_velocity", **GRADIENT)


@pytest.mark.parametrize("eps", GUARDS)
def test_guard_losses(eps):
    """Each sample has its own step here, so the loss is the mean of one-sample losses.

    Mutation: a bias averaged over the batch, the diffusion coefficient for the step's std, no
    division by -dt.
    """
    s, bound = Steps("flow_sde"), float(eps)
    log_ratio, kl = s.log_ratio(), s.kl(s.old)
    none, advantage = torch.zeros_like(kl), GOLDENS["advantage"].double()
    columns = [values.split(1) for values in (log_ratio, advantage, kl, none, none)]
    function = Guard(clip_low=bound, clip_high=bound, advantage_clip=5.0)
    how = {"form": "gaussian", "reduction": "mean", "dimensions": 1}
    losses = [
        function(LossInputs(*row, step.std, interval.dt, **how)).loss
        for step, interval, *row in zip(s.steps, s.intervals, *columns, strict=True)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    close(loss.view(1), f"flow_sde.guard_{eps}.loss")
    close(s.velocity.grad, f"flow_sde.guard_{eps}.grad_velocity", **GRADIENT)
    std = torch.tensor([step.std for step in s.steps], dtype=torch.float64)
    close(((log_ratio + kl) * std).exp(), "flow_sde.guard.ratio")


@pytest.mark.parametrize("beta", BETAS)
def test_nft_losses(beta):
    """Mutation: swap the branches, a weight with gradient, no division by beta."""
    names = ("nft.x0", "nft.x_sigma", "nft.sigma", "velocity", "old_velocity", "advantage")
    values = [GOLDENS[name].double() for name in names]
    velocity = values[3].requires_grad_()
    decay = {"fraction": 0.99, "decay_rate": 0.001, "decay_start": 0, "decay_limit": 0.5}
    loss = NFT(beta=float(beta), advantage_clip=5.0, **decay)(
        ForwardInputs(*values, torch.ones(8, dtype=torch.bool))
    ).loss
    loss.backward()
    close(loss.view(1), f"nft.beta_{beta}.loss")
    close(velocity.grad, f"nft.beta_{beta}.grad_velocity", **GRADIENT)


@pytest.mark.parametrize("key", ADVANTAGES)
def test_advantages(key):
    """Mutation: sample std, another floor, statistics over the wrong axis."""
    rewards, groups = GOLDENS["adv.rewards"], GOLDENS["adv.group_id"]
    valid = torch.ones(len(rewards), dtype=torch.bool)
    close(
        ADVANTAGES[key](rewards, torch.ones(2, dtype=rewards.dtype), groups, valid).values,
        key,
        atol=1e-6,
    )


def test_no_key_is_forgotten():
    """Mutation: none of the code; adding a golden without a test fails here."""
    known = {*INPUTS, *ADVANTAGES, "adv.rewards", "adv.group_id"}
    known |= {f"{name}.{key}" for name in SAMPLERS for key in TENSORS}
    known |= {
        f"{n}.clip_{eps}.{part}"
        for n in CLIPS
        for eps in CLIPS[n]
        for part in ("loss", "grad_velocity")
    }
    known |= {
        f"{n}.dppo_{d}.{part}"
        for n in SAMPLERS
        for d in DELTAS
        for part in ("loss", "masked", "grad_velocity")
    }
    known |= {"flow_sde.guard.ratio", "nft.sigma", "nft.x0", "nft.x_sigma"}
    known |= {f"nft.beta_{beta}.{part}" for beta in BETAS for part in ("loss", "grad_velocity")}
    known |= {
        f"flow_sde.guard_{eps}.{part}" for eps in GUARDS for part in ("loss", "grad_velocity")
    }
    assert set(GOLDENS) == known
