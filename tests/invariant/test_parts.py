"""Weights divided among processes (FSDP2) give the numbers that whole weights give."""

import numpy as np
import pytest
import torch
from parallel import run, spawn
from torch import distributed, nn

from flowrl.runs.checkpoint import load_optimizer_tensors, optimizer_tensors
from flowrl.tuning.full import Full

LATENT, TOKENS, DIMENSIONS = (4, 8, 8), 3, {"joint_attention_dim": 16, "pooled_projection_dim": 12}


def transformer():
    """A random SD3 transformer of two blocks, the same in every process."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=4,
        caption_projection_dim=12,
        pos_embed_max_size=8,
        **DIMENSIONS,
    ).eval()


def loss(network, rows):
    """A mean over rows of the global batch of four, so that the mean over processes is the mean
    over the batch.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, *LATENT), (4, TOKENS, 16), (4, 12), (4, *LATENT))
    x, tokens, pooled, target = (torch.randn(shape, generator=generator)[rows] for shape in shapes)
    return (
        (network(x, tokens, pooled, torch.full((len(x),), 500.0), return_dict=False)[0] - target)
        .square()
        .mean()
    )


def step(tuning, optimizer, rows):
    """One step on two terms, with the reference's pass between the last forward and its backward
    pass.
    """
    network = tuning.transformer
    optimizer.zero_grad()
    for term in rows.chunk(2):
        value = loss(network, term)
        with torch.no_grad(), tuning.at_reference():
            reference = float(loss(network, term))
        (value / 2).backward()
    optimizer.step()
    return reference


def parts(rank, count, folder):
    """The step with divided weights: this process's shares, and what is gathered and written."""
    from torch.distributed.device_mesh import init_device_mesh

    from flowrl.parallel import sharding
    from flowrl.parallel.strategies import clip

    distributed.init_process_group("gloo", rank=rank, world_size=count)
    network = transformer()
    tuning = Full(dtype="float32").attach(network, 0)
    sharding.divide(network, init_device_mesh("cpu", (count,)))
    for name, weight in network.named_parameters():
        tuning.reference[name] = sharding.part_of(tuning.reference[name], weight)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, eps=1e-2)
    rows = torch.arange(4).chunk(count)[rank]
    first = step(tuning, optimizer, rows)
    norm = clip(list(network.parameters()), 1e9)
    tensors = sharding.gathered(optimizer_tensors(optimizer), is_kept=True)
    fresh = torch.optim.AdamW(network.parameters(), lr=0.01, eps=1e-2)
    load_optimizer_tensors(fresh, tensors)
    second = step(tuning, fresh, rows)
    whole = sharding.gathered(network.state_dict(), is_kept=True)
    sharding.save(network, folder)
    held = sum(weight.to_local().numel() for weight in network.parameters())
    distributed.destroy_process_group()
    return (
        rank,
        first,
        second,
        float(norm),
        held,
        {name: value.numpy() for name, value in whole.items()},
    )


def test_a_step_of_divided_weights_is_that_of_whole_ones(tmp_path):
    """Two steps, the optimizer's state gathered and divided again between them: norm, reference and
    weights agree.

    Mutation: let gloo sum gradients for a mean, keep the rest of the weights gathered over the
    reference's pass (it then sees trained ones), or write the class that dividing made.
    """
    whole = transformer()
    tuning = Full(dtype="float32").attach(whole, 0)
    before, own = (
        {name: value.detach() for name, value in net.named_parameters()}
        for net in (transformer(), whole)
    )
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01, eps=1e-2)
    references = [step(tuning, optimizer, torch.arange(4))]
    norm = float(nn.utils.clip_grad_norm_(whole.parameters(), 1e9))
    references.append(step(tuning, optimizer, torch.arange(4)))
    assert references[0] == references[1]
    answers = sorted(spawn(parts, 2, tmp_path), key=lambda own: own[0])
    moved = max(float((value - before[name]).abs().max()) for name, value in own.items())
    assert moved > 5e-3
    for rank, first, second, own_norm, held, weights in answers:
        halves = [loss_of_start(rows) for rows in torch.arange(4).chunk(2)[rank].chunk(2)]
        assert first == second == pytest.approx(halves[1], rel=1e-6)
        assert own_norm == pytest.approx(norm, rel=1e-5)
        assert held < 0.6 * sum(value.numel() for value in before.values())
        gaps = [np.abs(weights[name] - value.numpy()).max() for name, value in own.items()]
        assert max(gaps) < 1e-6
    again = type(whole).from_pretrained(tmp_path)
    ours = dict(again.named_parameters())
    assert all(np.array_equal(ours[name].detach().numpy(), answers[0][5][name]) for name in before)


def loss_of_start(rows):
    network = transformer()
    with torch.no_grad():
        return float(loss(network, rows))


@pytest.mark.slow
def test_divided_runs_equal_replicated_ones():
    """Full fine-tuning by Lightning's strategies, two processes each: 1e-4 apart at most, after
    moving much further.

    Three batches of evaluation do not split evenly, so one process draws one for nothing. Mutation:
    let it rest, which hangs; sum gradients in place of their mean; or keep the EMA whole.
    """
    given = (
        "tuning=full",
        "optimizer.lr=1e-3",
        "optimizer.eps=1e-5",
        "penalty=mean_squared",
        "evaluation.batch_size=5",
    )
    whole, parts = run(2, *given), run(2, *given, "trainer=fsdp")
    one = whole[0]
    moved = max(np.abs(one.parameters[name] - value).max() for name, value in one.start.items())
    assert moved > 2e-3
    for ours, theirs in zip(parts, whole, strict=True):
        assert (ours.prompts, ours.noise) == (theirs.prompts, theirs.noise)
        assert all(np.array_equal(ours.start[name], value) for name, value in theirs.start.items())
        assert (
            max(
                np.abs(ours.parameters[name] - value).max()
                for name, value in theirs.parameters.items()
            )
            < 1e-4
        )
        assert ours.rewards == pytest.approx(theirs.rewards, abs=1e-4)
        assert ours.evaluation == pytest.approx(theirs.evaluation, rel=1e-3, abs=1e-5)
        norms = [[row["update/grad_norm"] for row in seen.metrics] for seen in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
