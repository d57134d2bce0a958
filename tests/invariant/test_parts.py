"""Weights divided among processes (FSDP2) give the numbers that whole weights give."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parallel import run, spawn
from torch import distributed, nn

from flowrl.runs.checkpoint import load_optimizer_tensors, optimizer_tensors
from flowrl.tuning import formats
from flowrl.tuning.full import Full
from flowrl.tuning.lora import LoRA, weights_of

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


def recipe(dtype):
    """Full fine-tuning in float32; a LoRA of some of the blocks' layers on a base in bfloat16."""
    if dtype == "float32":
        return Full(dtype=dtype)
    return LoRA(rank=2, alpha=4, targets=["to_q", "to_out.0"], init="gaussian")


def tuned(dtype):
    """The transformer with what is trained, of which no weight is zero."""
    tuning = recipe(dtype).attach(transformer().to(getattr(torch, dtype)), 0)
    if dtype == "bfloat16":
        tuning.transformer.enable_gradient_checkpointing()
        with torch.no_grad():
            for i, value in enumerate(tuning.parameters().values()):
                value.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
    return tuning


def loss(network, rows):
    """A mean over rows of the global batch of four, so that the mean over processes is the mean
    over the batch.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, *LATENT), (4, TOKENS, 16), (4, 12), (4, *LATENT))
    x, tokens, pooled, target = (torch.randn(shape, generator=generator)[rows] for shape in shapes)
    inputs = (value.to(network.dtype) for value in (x, tokens, pooled))
    output = network(*inputs, torch.full((len(x),), 500.0), return_dict=False)[0]
    return (output.float() - target).square().mean()


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


def parts(rank, count, folder, dtype="float32"):
    """The step with divided weights: this process's shares, and what is gathered and written."""
    from torch.distributed.device_mesh import init_device_mesh

    from flowrl.parallel import sharding, strategies

    distributed.init_process_group("gloo", rank=rank, world_size=count)
    tuning = tuned(dtype)
    network = tuning.transformer
    strategy = strategies.parts(num_processes=count, timeout_minutes=2)
    strategy._device_mesh = init_device_mesh("cpu", (count,), mesh_dim_names=("data_parallel",))
    module = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy))
    assert strategies.shard(module, network, tuning.reference)
    trained = list(tuning.parameters().values())
    optimizer = torch.optim.AdamW(trained, lr=0.01, eps=1e-2)
    rows = torch.arange(4).chunk(count)[rank]
    first = step(tuning, optimizer, rows)
    norm = strategies.clip(trained, 1e9)
    tensors = sharding.gathered(optimizer_tensors(optimizer), is_kept=True)
    fresh = torch.optim.AdamW(trained, lr=0.01, eps=1e-2)
    load_optimizer_tensors(fresh, tensors)
    second = step(tuning, fresh, rows)
    whole = sharding.gathered(tuning.parameters(), is_kept=True)
    tuning.save(None, folder)
    held = sum(weight.to_local().numel() for weight in network.parameters())
    distributed.destroy_process_group()
    return (
        rank,
        first,
        second,
        float(norm),
        held,
        {name: value.detach().numpy() for name, value in whole.items()},
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


def loss_of_start(rows, dtype="float32"):
    network = transformer().to(getattr(torch, dtype))
    with torch.no_grad():
        return float(loss(network, rows))


def test_a_lora_is_divided_with_its_base(tmp_path):
    """In float32 beside a base in bfloat16, whose blocks are recomputed: two steps and the norm are
    those of whole weights, the reference is the base alone, each process holds half of either, and
    the exported file has what was trained.

    Mutation: keep the parameters that were there before, leave the base whole, or write the first
    process's parts.
    """
    whole = tuned("bfloat16")
    before = {name: value.detach().clone() for name, value in whole.parameters().items()}
    optimizer = torch.optim.AdamW(whole.parameters().values(), lr=0.01, eps=1e-2)
    step(whole, optimizer, torch.arange(4))
    norm = float(nn.utils.clip_grad_norm_(whole.parameters().values(), 1e9))
    step(whole, optimizer, torch.arange(4))
    answers = sorted(spawn(parts, 2, tmp_path, "bfloat16"), key=lambda own: own[0])
    num_weights = sum(value.numel() for value in whole.transformer.parameters())
    for rank, first, second, own_norm, held, weights in answers:
        last = torch.arange(4).chunk(2)[rank][1:]
        assert first == second == loss_of_start(last, "bfloat16")
        assert own_norm == pytest.approx(norm, rel=1e-2)
        assert held < 0.6 * num_weights
        for name, value in whole.parameters().items():
            moved = np.abs(value.detach().numpy() - before[name].numpy())
            gap = np.abs(value.detach().numpy() - weights[name])
            assert moved.max() > 1e-3 and gap.max() < 0.05 * moved.max()
    exported = weights_of(formats.read(tmp_path))
    ours = answers[0][5]
    assert exported.keys() == ours.keys()
    assert all(np.array_equal(value.numpy(), ours[name]) for name, value in exported.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "bound"),
    [
        ("tuning=full penalty=mean_squared", 1e-4),
        ("tuning=lora penalty=mean_squared", 1e-6),
        ("tuning=lora lora.compute=merged penalty=mean_squared", 1e-6),
        ("tuning=lora lora.compute=base_dtype penalty=mean_squared", 1e-6),
        ("tuning=lora loss=nft sampler=ode penalty=velocity", 1e-6),
    ],
)
def test_divided_runs_equal_replicated_ones(overrides, bound):
    """Runs by Lightning's strategies, two processes each, after moving much further: a LoRA's are
    1.5e-8 apart, and 9.5e-8 from that of one process, which from the replicated ones is 8.9e-8.

    Three batches of evaluation do not split evenly, so one process draws one for nothing. Mutation:
    let it rest, which hangs; sum gradients in place of their mean; or keep the EMA whole.
    """
    given = (
        *overrides.split(),
        "optimizer.lr=1e-3",
        "optimizer.eps=1e-5",
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
            < bound
        )
        assert ours.rewards == pytest.approx(theirs.rewards, abs=1e-4)
        assert ours.evaluation == pytest.approx(theirs.evaluation, rel=1e-3, abs=1e-5)
        norms = [[row["update/grad_norm"] for row in seen.metrics] for seen in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
