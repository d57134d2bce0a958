"""Which timestep belongs to a sigma, which layers `lora.targets=auto` names, and the pipeline's
grid as a schedule.
"""

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from flowrl.errors import UserError
from flowrl.models.derived.networks import take_times_in_float32
from flowrl.models.derived.times import Times
from flowrl.schedule import PipelineGrid, intervals
from flowrl.tuning.targets import targets_of


def test_a_timestep_that_follows_from_sigma_serves_any_sigma():
    """Mutations: a scale of 1, or the nearest pair's timestep."""
    times = Times([1.0, 0.5], torch.tensor([1000.0, 500.0]), 1000)
    sigma, timestep = times.at(0.3)
    assert (sigma, timestep.tolist()) == (0.3, pytest.approx([300.0]))


def test_a_timestep_of_its_own_serves_the_grids_sigmas_alone():
    """CogView4's are those before the shift. Mutation: 1000 sigma for all."""
    times = Times([1.0, 0.75], torch.tensor([1000.0, 500.0]), 1000)
    assert times.keep([1.0, 0.75], torch.tensor([1000.0, 500.0])) == (1.0, 0.75, 0.0)
    assert times.at(0.75)[1].tolist() == [500.0]
    with pytest.raises(UserError, match=r"sigma 0.6 is not on the pipeline's own grid"):
        times.at(0.6)


def test_rounded_timesteps_are_no_function():
    """Mutation: compare after rounding."""
    assert not Times([0.9994], torch.tensor([999]), 1000).is_function


def test_a_pipeline_that_counts_from_noise_0_to_data_1_is_turned_round():
    """Mochi's: its sigma 0.25 is FlowRL's 0.75. Mutations: keep its order, or its sigma."""
    times = Times([0.0, 0.25], torch.tensor([0.0, 250.0]), 1000)
    assert times.is_mirrored
    assert times.keep([0.0, 0.25], torch.tensor([0.0, 250.0])) == (1.0, 0.75, 0.0)
    assert times.at(0.75)[0] == 0.25
    sigma, timestep = times.at(0.875)
    assert (sigma, timestep.tolist()) == (0.125, [125.0])


def test_a_schedule_that_is_the_models_own():
    """Mutations: ask the model at every step, or keep one grid for all numbers of steps."""
    schedule = PipelineGrid()
    with pytest.raises(UserError, match="schedule=pipeline is the grid of model=derived"):
        schedule.sigmas(2)
    asked = []

    def grid(num_steps):
        asked.append(num_steps)
        return (1.0, *([0.5] * (num_steps - 1)), 0.0)

    schedule.follow(grid)
    assert [step.sigma_next for step in intervals(schedule, 2)] == [0.5, 0.0]
    assert schedule.sigmas(2) == (1.0, 0.5, 0.0)
    assert schedule.sigmas(1) == (1.0, 0.0)
    assert asked == [2, 1]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(2, 2)
        self.to_out = nn.ModuleList([nn.Linear(2, 2), nn.Dropout()])
        self.norm_q = nn.LayerNorm(2)
        self.norm_added = nn.Linear(2, 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = Attention()
        self.self_attention = Attention()
        self.ff = nn.Linear(2, 2)


def test_automatic_targets_are_the_attentions():
    """Whatever their place is called, without norms and feed-forward layers. Mutation: take all
    linear layers.
    """
    layers = ["attn1.to_q", "attn1.to_out.0", "self_attention.to_q", "self_attention.to_out.0"]
    assert targets_of(nn.Sequential(Block())) == [f"0.{name}" for name in layers]
    with pytest.raises(UserError, match=r"lora.targets=auto finds no attention in a Linear"):
        targets_of(nn.Linear(2, 2))


def test_sines_in_float32_enter_layers_of_another_dtype():
    """As those of the layers' own. Mutation: leave the layers as they are."""
    embedding = TimestepEmbedding(8, 4).bfloat16()
    sines = torch.linspace(-1, 1, 8)[None]
    expected = embedding(sines.bfloat16())
    take_times_in_float32(nn.Sequential(embedding))
    assert torch.equal(embedding(sines), expected)
