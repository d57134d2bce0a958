"""Plans of a run's memory, on small random pipelines without their weights."""

from dataclasses import replace

import pytest
import torch
from layer_products import products
from runs import composed
from tiny import FAMILIES
from torch import nn

from flowrl.cli import memory_plan
from flowrl.cli import plan as plan_memory
from flowrl.cli.memory_plan import Plan
from flowrl.cli.plan_costs import Choice, Costs, fastest
from flowrl.errors import UserError
from flowrl.models import architectures, meta_memory
from flowrl.tuning.weights import swapped

TWELVE = (
    "batch.prompts_per_iteration=2",
    "batch.group_size=6",
    "batch.updates_per_iteration=1",
)


def planned(pipelines, *overrides, size=(32, 32)):
    """A plan of the small SD3.5."""
    return Plan(composed(*FAMILIES["sd3"].overrides(pipelines["sd3"], size), *overrides))


@pytest.fixture(scope="module")
def plan(tiny_pipelines):
    """A LoRA, 12 samples an iteration, blocks recomputed."""
    return planned(tiny_pipelines, *TWELVE)


@pytest.fixture(scope="module")
def one_and_two(plan):
    """The costs of one row and of two."""
    return plan.costs(1), plan.costs(2)


def bytes_of(module):
    return sum(parameter.nbytes for parameter in module.parameters())


def test_peak_counts_what_is_alive():
    """1,000 floats of 4 bytes each: two at once, though four are made. Mutation: never subtract, or
    count views.
    """
    with meta_memory.Peak() as counter:
        x = torch.empty(1000, device="meta")
        for _ in range(3):
            x = (x * 2).view(10, 100).flatten()
        assert counter.live == 4000
    assert counter.peak == 8000


def test_peak_counts_what_a_backward_pass_needs():
    """sigmoid keeps its output: n layers keep n. Mutation: run the forward pass without
    gradients.
    """
    weight = torch.empty(1000, device="meta", requires_grad=True)

    def work(depth):
        x = weight
        for _ in range(depth):
            x = x.sigmoid()
        x.sum().backward()

    assert meta_memory.peak_of(lambda: work(20)) - meta_memory.peak_of(lambda: work(10)) == 40_000


@pytest.mark.parametrize("name", ["sd3", "flux2_klein"])
def test_a_plan_without_weights(name, call, tiny_pipelines):
    """For two GPUs: all eight samples fit the first, without blocks that are recomputed, and
    nothing the second.

    Mutation: propose a micro-batch that does not fit, recompute though all fits, read the weights,
    or look at one GPU alone.
    """
    own = FAMILIES[name].overrides(tiny_pipelines[name])
    batch = ("batch.prompts_per_iteration=2", "batch.group_size=4", "batch.updates_per_iteration=1")
    status, out, err = call(plan_memory, *own, *batch, "--gpu", "8,1e-6")
    assert status == 0, err
    *tables, first, second = out.splitlines()
    proposal = "batch.max_micro_batch=8 backend.gradient_checkpointing=false"
    assert first == f"within 8 GiB, 8% kept free: {proposal}"
    assert second.startswith("nothing fits 1e-06 GiB with 8% kept free; change ")
    heads = [line for line in tables if line.startswith("backend.gradient_checkpointing=")]
    assert heads == [
        "backend.gradient_checkpointing=true (as configured)",
        "backend.gradient_checkpointing=false",
    ]
    assert "x the operations of an iteration" in out
    assert "without text encoders" in out


@pytest.mark.parametrize("words", ["24,lots", "0", "-8", "nan", "inf", "16,", ""])
def test_sizes_that_are_none_are_refused_in_a_line(words, call):
    """Mutation: take zero, infinity or an empty size for one."""
    status, out, err = call(plan_memory, f"--gpu={words}")
    assert status and not out
    assert err.count("\n") == 1 and "a number of GiB above 0" in err


def test_a_plan_holds_each_prompt_once(tiny_pipelines):
    """Eight samples of two prompts instead of one: 80 + 77 tokens of 32 numbers and 32 pooled ones
    more, 4 bytes each.

    Mutation: count a prompt for every sample.
    """
    held = []
    for num_prompts in (1, 2):
        batch = (
            f"batch.prompts_per_iteration={num_prompts}",
            f"batch.group_size={8 // num_prompts}",
        )
        plan = planned(tiny_pipelines, *batch, "batch.updates_per_iteration=1")
        held.append(plan.iteration(1, plan.conditioning(1)))
    assert held[1] - held[0] == 4 * ((80 + 77) * 32 + 32)


def test_a_plan_keeps_an_iterations_states_on_the_host(tiny_pipelines):
    """Eight samples: state, next state and mean of each of three trained steps there, 4 x 4 x 8 x 8
    bytes each; on the GPU the last states, one prompt, and three images of 12 x 32 x 32 bytes.

    Mutation: count the states of all samples on the GPU, or all images.
    """
    batch = ("batch.prompts_per_iteration=1", "batch.group_size=8", "batch.updates_per_iteration=1")
    method = ("rollout.num_steps=4", "steps=all_but_last", "loss=grpo")
    plan = planned(tiny_pipelines, *batch, *method)
    assert plan.num_kept == 3
    assert plan.host() == 8 * 3 * 3 * 4 * 4 * 8 * 8
    prompt = 4 * ((80 + 77) * 32 + 32)
    assert plan.iteration(1, plan.conditioning(1)) == 8 * 1024 + 3 * 12 * 32 * 32 + prompt


@pytest.mark.parametrize("rows", [3, 4, 12])
def test_a_plan_of_many_rows_is_that_of_their_passes(rows, plan, one_and_two):
    """Of 12 samples, 3 micro-batches of 3 wait and all 12 images with 4 rows or more.

    Mutation: let the images that wait grow with the rows beyond all that there are.
    """
    costs = plan.extrapolated(rows, *one_and_two)
    assert costs == plan.costs(rows)
    prompts = 2 * 4 * ((80 + 77) * 32 + 32)
    images = 12 * 32 * 32 * min(3 * rows, 12)
    assert costs.iteration == 12 * 1024 + images + prompts


def test_a_plan_counts_the_pixels_of_a_picture_that_is_no_square(call, tiny_pipelines):
    """Mutation: the square of one side."""
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"], (32, 48))
    assert planned(tiny_pipelines, size=(32, 48)).pixels == 32 * 48
    status, out, err = call(plan_memory, *own)
    assert status == 0 and "32 x 48 (height x width) pixels" in out, err


@pytest.mark.parametrize(
    ("overrides", "expected", "step"),
    [
        (
            (),
            6,
            1,
            # the start, the weights, their gradients, two moments, the average; the root of the
            # second moment
        ),
        (("trainer=ddp",), 7, 1),  # the buckets in which gradients are reduced
        (("trainer=fsdp",), 3, None),  # two processes
        (("sampler=dpm2", "loss=nft", "penalty=velocity"), 7, 1),  # the old policy
    ],
)
def test_a_plan_of_full_fine_tuning(overrides, expected, step, tiny_pipelines):
    """Multiples of the weights; divided ones are stepped one by one, with two temporaries of the
    largest.

    Mutation: a copy less, a moment less, or the weights undivided.
    """
    plan = planned(tiny_pipelines, "tuning=full", *overrides)
    transformer, vae = plan.model.transformer, plan.model.vae
    constants = sum(buffer.nbytes for buffer in transformer.buffers())
    costs = plan.costs(1)
    assert costs.fixed == expected * bytes_of(transformer) + constants + memory_plan.size(vae)
    if step is None:
        largest = max(value.nbytes for value in transformer.parameters())
        assert costs.step == pytest.approx(2 * largest / 2, rel=0.01)
    else:
        assert costs.step == step * bytes_of(transformer)
    assert costs.peak >= costs.fixed + max(costs.iteration + costs.step, costs.evaluation)


def test_a_plan_of_divided_weights_makes_blocks_whole(tiny_pipelines):
    """What is in no block and 3 blocks in a pass; twice as much in an update. Mutation: a pass on
    its part alone.
    """
    assert planned(tiny_pipelines, "tuning=full").gathered == (0, 0)
    plan = planned(tiny_pipelines, "tuning=full", "trainer=fsdp", "trainer.devices=4")
    blocks = [bytes_of(block) for block in plan.model.transformer.transformer_blocks]
    whole = bytes_of(plan.model.transformer) - sum(blocks) + 3 * max(blocks)
    assert plan.share == bytes_of(plan.model.transformer) // 4
    assert plan.gathered == (whole, 2 * whole)
    assert plan.costs(1).rollout > whole


def test_a_plan_of_a_divided_lora(tiny_pipelines):
    """Four processes: a quarter of the base, whose buffers stay whole, and of the LoRA with
    gradient, average and both moments; a pass gathers either, and reduces the LoRA's gradients
    alone. Nothing is set aside for the reference, the base without it.

    Mutation: leave the base whole, or count its gradients.
    """
    plan = planned(tiny_pipelines, "trainer=fsdp", "trainer.devices=4")
    network, trained = plan.model.transformer, sum(v.nbytes for v in plan.trained.values())
    constants = sum(buffer.nbytes for buffer in network.buffers())
    rows = plan.weights()
    assert constants and rows["frozen weights"] == (bytes_of(network) - trained) // 4 + constants
    assert rows["trained weights"] == rows["their gradients"] == rows["EMA"] == trained // 4
    assert rows["optimizer"] == pytest.approx(trained / 2, rel=1e-3)
    blocks = [bytes_of(block) for block in network.transformer_blocks]
    in_pass = bytes_of(network) - sum(blocks) + 3 * max(blocks)
    of_blocks = [
        sum(v.nbytes for v in block.parameters() if v.requires_grad)
        for block in network.transformer_blocks
    ]
    assert trained == sum(of_blocks)  # no layer outside of blocks has a LoRA
    assert plan.gathered == (in_pass, in_pass + 3 * max(of_blocks))
    assert plan.aside_for_ref == 0


def test_a_plan_counts_an_evaluation_as_it_is_run(tiny_pipelines):
    """The weights that `swapped` sets aside and a batch of 3 with guidance; 5 prompts of 2 images:
    10 times 4 x 4 x 8 x 8 bytes of noise, and of the images, 12 x 32 x 32 bytes each, those of the
    batch that is scored and of two that wait. Mutation: the rollout's guidance, or no copy of the
    weights.
    """
    overrides = ("tuning=full", "evaluation.batch_size=3")
    counts = (
        "evaluation.images_per_prompt=2",
        "rollout.guidance_scale=1.0",
        "evaluation.guidance_scale=4.5",
    )
    plan = planned(tiny_pipelines, *overrides, *counts, "evaluation.max_prompts=null")
    x, given = torch.empty(3, 4, 8, 8, device="meta"), plan.conditioning(3)

    @torch.no_grad()
    def passes(decodes):
        with swapped(plan.tuning.parameters(), plan.tuning.parameters()):
            plan.model.decode(x[:1]) if decodes else plan.model.velocity(x, 0.5, given, 4.5)

    prompts, images = 3 * 2 * 4 * ((80 + 77) * 32 + 32), 3 * 12 * 32 * 32
    velocity, decoding = (
        meta_memory.peak_of(lambda decodes=decodes: passes(decodes)) for decodes in (False, True)
    )
    assert plan.evaluation == max(velocity + prompts, decoding + images)
    bounded = planned(tiny_pipelines, *overrides, *counts, "evaluation.max_prompts=5")
    held = bounded.evaluation - plan.evaluation
    assert held == 9 * 12 * 32 * 32 + 10 * 4 * 4 * 8 * 8
    assert plan.remedies(plan.costs(1)).startswith("trainer=fsdp")


class HasWeights:
    """A private scorer, of which a plan knows nothing."""

    def __call__(self, images, prompts):
        raise NotImplementedError


def test_recomputing_blocks_is_planned_either_way(plan):
    """An update takes less memory with it, the rollout and decoding the same; what is not said is
    as configured, and so is the network afterwards.

    Mutation: plan one way for both, or leave the network as it was switched.
    """
    recomputed, plain = plan.costs(2, True), plan.costs(2, False)
    assert recomputed.update < plain.update
    assert replace(recomputed, update=plain.update) == plain
    assert plan.can_checkpoint and plan.is_checkpointed
    assert plan.model.transformer.is_gradient_checkpointing
    assert plan.costs(2) == recomputed


def test_the_operations_of_an_image_by_hand(plan, monkeypatch):
    """Four steps of a rollout, and two trained terms, in each of which the blocks' forward pass is
    made once more where they are recomputed.

    Mutation: count one step, one term or one inner epoch, or recompute nothing.
    """
    network = plan.model.transformer
    arguments = (plan.noise(1), plan.conditioning(1), plan.method.guidance_scale, 0)

    def count(modules):
        return products(modules, lambda: plan.look(*arguments))

    plain, recomputed = plan.work(False), plan.work(True)
    assert plain.rollout == recomputed.rollout == 4 * count(network.modules())
    assert plain.decode == recomputed.decode > 0
    assert recomputed.update - plain.update == 2 * count(network.transformer_blocks.modules())
    assert plain.total == plain.rollout + plain.decode + plain.update
    monkeypatch.setattr(plan, "plan", replace(plan.plan, inner_epochs=3))
    assert plan.work(False) == replace(plain, update=3 * plain.update)


def test_the_completions_of_steps_are_counted(tiny_pipelines):
    """Of four steps the first three are stochastic: completions of 4, 3 and 2 steps, and their
    images. Mutation: count the rollout alone.
    """
    words = (*TWELVE, "steps=all_but_last", "rollout.credit")
    whole, by_step = (
        planned(tiny_pipelines, *words[:-1], f"{words[-1]}={credit}").work(False)
        for credit in ("trajectory", "step")
    )
    assert by_step.rollout == whole.rollout * (4 + 4 + 3 + 2) / 4
    assert by_step.decode == 4 * whole.decode
    assert by_step.update == whole.update


def test_operations_of_a_forward_loss_count_the_old_policy(tiny_pipelines):
    """A sample trains on three of the grid's four sigmas, and each takes a pass of the old policy's
    too. Mutation: count none of these, or the whole grid.
    """
    plan = planned(tiny_pipelines, "sampler=dpm2", "loss=nft", "penalty=velocity")
    term = meta_memory.flops_of(lambda: plan.update(plan.noise(1), plan.conditioning(1)))
    work = plan.work()
    assert work.update == 3 * (term + work.rollout // 4)


def test_candidates_are_in_the_operations_and_among_the_images_that_wait(tiny_pipelines):
    """24 candidates in two steps each for 6 images in four. Of a process's 12 samples in one
    micro-batch at most 12 images wait for their scores, of its 48 candidates three times as many.

    Mutation: count a candidate as a rollout, or once for every kept one.
    """
    forward = (*TWELVE, "sampler=dpm2", "loss=nft", "penalty=velocity")
    scouted = ("scouting=best_worst", "scouting.candidates=24", "scouting.num_steps=2")
    plain = planned(tiny_pipelines, *forward)
    plan = planned(tiny_pipelines, *forward, *scouted)
    work = plan.work()
    assert work.scouting == 24 * (2 * work.rollout // 4 + work.decode) // 6
    assert work.total - work.scouting == plain.work().total and not plain.work().scouting
    embeddings = plan.conditioning(1)
    more = plan.iteration(12, embeddings) - plain.iteration(12, embeddings)
    assert more == (36 - 12) * 12 * plan.pixels


def test_operations_are_those_of_products():
    """A layer of 3 x 5 weights and 2 rows: 60 forwards and, for its weights alone, 60 backwards.

    Mutation: count multiplications alone.
    """
    x = torch.empty(2, 3, device="meta")
    layer = nn.Linear(3, 5, device="meta")
    assert meta_memory.flops_of(lambda: layer(x)) == 60
    assert meta_memory.flops_of(lambda: layer(x).sum().backward()) == 120


def table(*peaks):
    """Costs of 1, 2, 4, ... rows whose peaks are these."""
    return {2**i: Costs(peak, 0, 0, 0, 0, 0, 0) for i, peak in enumerate(peaks)}


@pytest.mark.parametrize(
    ("plain", "recomputed", "num_rows", "expected"),
    [
        ((1, 2, 4, 8), (1, 1, 2, 3), 8, Choice(4, False)),  # enough without
        ((2, 4, 8), (1, 2, 3, 4), 8, Choice(8, True)),
        ((2, 4), (1, 2), 2, Choice(2, False)),  # all that there are
        ((4, 8), (4, 5), 8, Choice(1, False)),  # recomputing gains no row
        ((8,), (4, 8), 8, Choice(1, True)),
        ((8,), (5,), 8, None),
        ((4, 8), None, 8, Choice(1, False)),  # a network that cannot
    ],
)
def test_the_fastest_choice_that_fits(plain, recomputed, num_rows, expected):
    """A room of 4. Mutation: recompute wherever more rows fit with it, or never."""
    tables = {False: table(*plain)}
    if recomputed is not None:
        tables[True] = table(*recomputed)
    assert fastest(tables, 4, num_rows, 4) == expected


def test_a_row_more_is_not_worth_recomputing():
    """Three of twelve without, four with it. Mutation: recompute for any row more."""
    plain, recomputed = (
        {rows: Costs(rows + more, *[0] * 6) for rows in (1, 2, 3, 4)} for more in (1, 0)
    )
    assert fastest({False: plain, True: recomputed}, 4, 12, 4) == Choice(3, False)


def test_scorers_lie_beside_the_weights(tiny_pipelines, plan):
    """PickScore's 986,109,441 parameters in 2 bytes each; shapes are judged by rules.

    Mutation: leave them out, or count 4 bytes.
    """
    words = ("reward=pickscore", "reward.dtype=bfloat16")
    scored = planned(tiny_pipelines, *TWELVE, *words)
    assert plan.weights()["scorers"] == 0
    assert scored.weights() == plan.weights() | {"scorers": 2 * 986_109_441}
    costs = Costs(1, 0, 1, 0, 0, 0, 0)
    assert "reward=remote" in scored.remedies(costs) and "reward" not in plan.remedies(costs)


def test_a_private_reward_is_said_not_to_be_counted(tiny_pipelines, capsys):
    """Mutation: pass over it."""
    words = [*FAMILIES["sd3"].overrides(tiny_pipelines["sd3"]), *TWELVE, "~reward"]
    cfg = composed(*words, "+reward._target_=test_memory_plan.HasWeights")
    plan_memory.print_weights(Plan(cfg), (8.0,))
    assert "  not counted: test_memory_plan.HasWeights, of reward\n" in capsys.readouterr().out


def test_loading_takes_the_hosts_memory(tiny_pipelines, plan, monkeypatch):
    """Transformer, autoencoder and the average of what is trained in float32, and a thousand
    weights of text encoders beside them; of a transformer in fewer bits the whole one before that.

    Mutation: leave one of them out, or the whole transformer.
    """
    network = memory_plan.size(plan.model.transformer)
    coder = memory_plan.size(plan.model.vae)
    average = sum(value.nbytes for value in plan.trained.values())
    assert plan.loading() == network + coder + average
    forward = planned(tiny_pipelines, *TWELVE, "sampler=ode", "loss=nft")
    assert forward.loading() == network + coder + 2 * average
    quantised = planned(tiny_pipelines, *TWELVE, "model.quantization=int8")
    assert memory_plan.size(quantised.model.transformer) < network
    assert quantised.loading() == network + coder
    monkeypatch.setitem(architectures.TEXT_PARAMETERS, plan.source, 1000)
    assert plan.loading() == network + coder + average + 4000


def test_what_training_refuses_is_not_planned(tiny_pipelines):
    """Mutation: attach the LoRA without a look at the layers."""
    with pytest.raises(UserError, match="names no linear layer"):
        planned(tiny_pipelines, *TWELVE, "lora.targets=[nowhere]")
