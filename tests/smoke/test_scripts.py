"""The scripts around base models, run in process on small random pipelines."""

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from hydra import compose, initialize_config_dir
from PIL import Image
from runs import CONF
from tiny import FAMILIES

from flowrl.cli import export as export_lora
from flowrl.cli import generate
from flowrl.cli import plan as plan_memory
from flowrl.launch.compose import register_resolvers
from flowrl.models import meta_memory
from flowrl.runs import checkpoint
from flowrl.tuning.formats import read
from flowrl.tuning.lora_file import LoRAFile
from flowrl.tuning.weights import swapped
from flowrl.tuning.writer import write

LAYERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.ff.net.2",
    "single_transformer_blocks.1.attn.to_v",
)


@pytest.fixture
def adapter(tmp_path):
    """A LoRA file for the small FLUX.1."""
    torch.manual_seed(0)
    a = {name: torch.randn(4, 128 if "ff" in name else 32) for name in LAYERS}
    return write(
        LoRAFile(a, {name: torch.randn(32, 4) for name in a}, dict.fromkeys(a, 8.0)),
        tmp_path,
        "diffusers",
    )


def opened(path):
    with Image.open(path) as image:
        image.load()
    return image


def test_pictures_of_base_and_lora_from_the_same_noise(call, adapter, tiny_pipelines, tmp_path):
    """Mutation: leave the LoRA on for the base, draw other noise for it, or lose the prompt in the
    file.
    """
    own = FAMILIES["flux1"].overrides(tiny_pipelines["flux1"])
    prompts = ("--prompt", "a red circle", "--prompt", "a blue square", "--count", 2)
    for name, more in (("with", ("--lora", adapter)), ("without", ())):
        status, _, err = call(
            generate, *own, "evaluation.num_steps=3", *prompts, "--out", tmp_path / name, *more
        )
        assert status == 0, err
    pictures = {path.name: opened(path) for path in (tmp_path / "with").glob("*.png")}
    assert pictures.keys() == {
        f"00{i}-{j}-{name}.png" for i in (0, 1) for j in (0, 1) for name in ("base", "lora")
    } | {"grid.png"}
    for i, text in enumerate(("a red circle", "a blue square")):
        base, changed = pictures[f"00{i}-1-base.png"], pictures[f"00{i}-1-lora.png"]
        assert base.info["prompt"] == changed.info["prompt"] == text
        assert changed.info["lora"] == str(adapter) and "lora" not in base.info
        alone = opened(tmp_path / "without" / f"00{i}-1-base.png")
        assert np.array_equal(np.array(base), np.array(alone)) and not np.array_equal(
            np.array(base), np.array(changed)
        )
        assert not np.array_equal(np.array(base), np.array(pictures[f"00{i}-0-base.png"]))
    assert pictures["grid.png"].width > 4 * 32


def test_prompts_of_a_file_of_json_objects(call, tiny_pipelines, tmp_path):
    """Their prompts are drawn, whatever the ending's case. Mutation: draw pictures of JSON."""
    path = tmp_path / "prompts.JSONL"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a red circle", "tag": "single"}\n')
    own = (*FAMILIES["flux1"].overrides(tiny_pipelines["flux1"]), "evaluation.num_steps=2")
    status, _, err = call(generate, *own, "--prompts", path, "--out", tmp_path / "out")
    assert status == 0, err
    assert opened(tmp_path / "out" / "000-0-base.png").info["prompt"] == "a red circle"
    path.write_text('{"prompt": null}\n')
    for words, reason in (
        (("--prompts", path), "prompts.JSONL line 1"),
        (("--prompt", " "), "--prompt: the prompt is"),
    ):
        status, _, err = call(generate, *own, *words, "--out", tmp_path / "none")
        assert status == 1 and reason in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_pictures_of_a_fully_trained_transformer(call, tiny_pipelines, tmp_path):
    """Beside the base, and named by its option. Mutation: draw both with the trained weights, or
    with the base's.
    """
    own = FAMILIES["flux1"].overrides(tiny_pipelines["flux1"])
    network = FluxTransformer2DModel.from_pretrained(
        tiny_pipelines["flux1"], subfolder="transformer"
    )
    with torch.no_grad():
        network.proj_out.bias += 0.5
    network.save_pretrained(tmp_path / "transformer")
    words = (*own, "evaluation.num_steps=3", "--prompt", "a cat", "--out", tmp_path / "out")
    status, _, err = call(generate, *words, "--transformer", tmp_path / "transformer")
    assert status == 0, err
    status, _, err = call(generate, *words[:-1], tmp_path / "base")
    assert status == 0, err
    base, changed = (
        opened(tmp_path / "out" / f"000-0-{name}.png") for name in ("base", "transformer")
    )
    assert changed.info["transformer"] == str(tmp_path / "transformer")
    assert np.array_equal(np.array(base), np.array(opened(tmp_path / "base" / "000-0-base.png")))
    assert not np.array_equal(np.array(base), np.array(changed))


def test_a_lora_of_another_model_draws_nothing(call, adapter, tiny_pipelines, tmp_path):
    """Mutation: draw with the base model where no layer fits."""
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"])
    status, _, err = call(
        generate, *own, "--prompt", "a cat", "--lora", adapter, "--out", tmp_path / "out"
    )
    assert status == 1 and "another architecture" in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_export_converts_and_checks(call, adapter, tiny_pipelines, tmp_path):
    """Mutation: convert without a look at the model that was named."""
    status, out, err = call(export_lora, adapter, "--format", "comfy", "--out", tmp_path / "comfy")
    assert status == 0 and "3 layers" in out, err
    assert read(tmp_path / "comfy").alpha == read(adapter).alpha
    flux, sd3 = (f"model.pretrained={tiny_pipelines[name]}" for name in ("flux1", "sd3"))
    assert (
        call(
            export_lora,
            adapter,
            "model=flux1_dev",
            flux,
            "--format",
            "peft",
            "--out",
            tmp_path / "peft",
        )[0]
        == 0
    )
    status, _, err = call(
        export_lora, adapter, "model=sd35_medium", sd3, "--format", "peft", "--out", tmp_path / "no"
    )
    assert status == 1 and "another architecture" in err and not (tmp_path / "no").exists()


def test_export_of_a_stopped_run_is_its_newest_checkpoints(call, tmp_path):
    """At alpha from the run's configuration. Mutation: take the oldest, or alpha as the rank."""
    for number in (5, 10):
        keys = {f"transformer_blocks.0.attn.to_q.lora_{part}.policy.weight": part for part in "AB"}
        ema = {
            key: torch.full((2, 3) if part == "A" else (3, 2), float(number))
            for key, part in keys.items()
        }
        checkpoint.save(
            tmp_path / "run" / "checkpoints",
            keep=2,
            weights={"ema": ema},
            state={"num_iterations": number},
        )
    (tmp_path / "run" / "config.yaml").write_text("lora: {rank: 2, alpha: 6}\n")
    status, out, err = call(export_lora, tmp_path / "run", "--format", "comfy")
    assert status == 0 and "checkpoint 000010" in out, err
    found = read(tmp_path / "run" / "lora_comfy")
    assert list(found.alpha.values()) == [6.0] and float(next(iter(found.a.values()))[0, 0]) == 10.0


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
    """Mutation: propose a micro-batch that does not fit, or read the weights."""
    own = FAMILIES[name].overrides(tiny_pipelines[name])
    batch = ("batch.prompts_per_iteration=2", "batch.group_size=4", "batch.updates_per_iteration=1")
    status, out, err = call(plan_memory, *own, *batch, "--gpu", 8)
    assert status == 0, err
    assert "batch.max_micro_batch=8" in out
    status, out, err = call(plan_memory, *own, *batch, "--gpu", 1e-6)
    assert status == 0 and "nothing fits" in out


def test_a_plan_holds_each_prompt_once(tiny_pipelines):
    """Eight samples of two prompts instead of one: 80 + 77 tokens of 32 numbers and 32 pooled ones
    more, 4 bytes each.

    Mutation: count a prompt for every sample.
    """
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"])
    held = []
    for num_prompts in (1, 2):
        batch = (
            f"batch.prompts_per_iteration={num_prompts}",
            f"batch.group_size={8 // num_prompts}",
        )
        plan = planned(*own, *batch, "batch.updates_per_iteration=1")
        held.append(plan.iteration(1, plan.conditioning(1)))
    assert held[1] - held[0] == 4 * ((80 + 77) * 32 + 32)


def test_a_plan_keeps_an_iterations_states_on_the_host(tiny_pipelines):
    """Eight samples: state, next state and mean of each of three trained steps there, 4 x 4 x 8 x 8
    bytes each; on the GPU the last states, one prompt, and three images of 12 x 32 x 32 bytes.

    Mutation: count the states of all samples on the GPU, or all images.
    """
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"])
    batch = ("batch.prompts_per_iteration=1", "batch.group_size=8", "rollout.num_steps=4")
    plan = planned(*own, *batch, "batch.updates_per_iteration=1", "steps=all_but_last", "loss=grpo")
    assert plan.num_kept == 3
    assert plan.host() == 8 * 3 * 3 * 4 * 4 * 8 * 8
    prompt = 4 * ((80 + 77) * 32 + 32)
    assert plan.iteration(1, plan.conditioning(1)) == 8 * 1024 + 3 * 12 * 32 * 32 + prompt


@pytest.mark.parametrize("rows", [3, 4, 12])
def test_a_plan_of_many_rows_is_that_of_their_passes(rows, tiny_pipelines):
    """Of 12 samples, 3 micro-batches of 3 wait and all 12 images with 4 rows or more.

    Mutation: let the images that wait grow with the rows beyond all that there are.
    """
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"])
    batch = ("batch.prompts_per_iteration=2", "batch.group_size=6")
    plan = planned(*own, *batch, "batch.updates_per_iteration=1")
    costs = plan.extrapolated(rows, plan.costs(1), plan.costs(2))
    assert costs == plan.costs(rows)
    prompts = 2 * 4 * ((80 + 77) * 32 + 32)
    images = 12 * 32 * 32 * min(3 * rows, 12)
    assert costs.iteration == 12 * 1024 + images + prompts


def test_a_plan_counts_the_pixels_of_a_picture_that_is_no_square(call, tiny_pipelines):
    """Mutation: the square of one side."""
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"], (32, 48))
    assert planned(*own).pixels == 32 * 48
    status, out, err = call(plan_memory, *own)
    assert status == 0 and "32 x 48 (height x width) pixels" in out, err


def planned(*overrides):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan_memory.Plan(compose("config", overrides=["name=plan", *overrides]))


def size(module):
    return sum(parameter.nbytes for parameter in module.parameters())


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
        (("trainer=fsdp",), 3, 0.5),  # two processes
        (("sampler=dpm2", "loss=nft", "penalty=velocity"), 7, 1),  # the old policy
    ],
)
def test_a_plan_of_full_fine_tuning(overrides, expected, step, tiny_pipelines):
    """Multiples of the weights. Mutation: a copy less, a moment less, or the weights undivided."""
    plan = planned(*FAMILIES["sd3"].overrides(tiny_pipelines["sd3"]), "tuning=full", *overrides)
    transformer, vae = plan.model.transformer, plan.model.vae
    constants = sum(buffer.nbytes for buffer in transformer.buffers())
    costs = plan.costs(1)
    assert costs.fixed == expected * size(transformer) + constants + plan_memory.size(vae)
    assert costs.step == step * size(transformer)
    assert costs.peak >= costs.fixed + max(costs.iteration + costs.step, costs.evaluation)


def test_a_plan_of_divided_weights_makes_blocks_whole(tiny_pipelines):
    """What is in no block and 3 blocks in a pass; twice as much in an update. Mutation: a pass on
    its part alone.
    """
    own = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"])
    assert planned(*own, "tuning=full").gathered == (0, 0)
    plan = planned(*own, "tuning=full", "trainer=fsdp", "trainer.devices=4")
    blocks = [size(block) for block in plan.model.transformer.transformer_blocks]
    whole = size(plan.model.transformer) - sum(blocks) + 3 * max(blocks)
    assert plan.share == size(plan.model.transformer) // 4
    assert plan.gathered == (whole, 2 * whole)
    assert plan.costs(1).rollout > whole


def test_a_plan_counts_an_evaluation_as_it_is_run(tiny_pipelines):
    """The weights that `swapped` sets aside and a batch of 3 with guidance; 5 prompts of 2 images:
    10 times 4 x 4 x 8 x 8 bytes of noise, and of the images, 12 x 32 x 32 bytes each, those of the
    batch that is scored and of two that wait. Mutation: the rollout's guidance, or no copy of the
    weights.
    """
    overrides = (
        *FAMILIES["sd3"].overrides(tiny_pipelines["sd3"]),
        "tuning=full",
        "evaluation.batch_size=3",
    )
    counts = (
        "evaluation.images_per_prompt=2",
        "rollout.guidance_scale=1.0",
        "evaluation.guidance_scale=4.5",
    )
    plan = planned(*overrides, *counts, "evaluation.max_prompts=null")
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
    held = planned(*overrides, *counts, "evaluation.max_prompts=5").evaluation - plan.evaluation
    assert held == 9 * 12 * 32 * 32 + 10 * 4 * 4 * 8 * 8
    assert plan.remedies(plan.costs(1)).startswith("trainer=fsdp")
