"""What every base model's adapter must keep, on small random pipelines: stock diffusers is the
reference.
"""

import gc
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from runs import awake, draw, fit, make
from tiny import FAMILIES

from flowrl.models.conditioning import split
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.protocol import FlowModel
from flowrl.noise import gaussian_noise
from flowrl.objectives.micro_batch import ConditionedRows
from flowrl.samplers.cps import CPS
from flowrl.samplers.ode import ODE
from flowrl.samplers.sde import FlowSDE
from flowrl.schedule import intervals
from flowrl.types import Prompt, RewardOutput

families = pytest.mark.parametrize("name", FAMILIES)
# What is a family's own where it repeats another's network, its text and its guidance, the first
# test sees.
distinct = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if family.repeats else name
        for name, family in FAMILIES.items()
    ],
)
PROMPTS = ["a red circle", "two blue squares", "a green triangle left of a red circle"]
STEPS = 4
BFLOAT16_GATE = 5e-7
"""What conf/backend/large.yaml allows a replay of a bfloat16 model."""


@pytest.fixture(scope="module")
def policy_of(tiny_pipelines):
    """Policy and data of a family's small pipeline, made once for each dtype."""
    made = {}

    def build(name, dtype, size=(32, 32)):
        if (name, dtype, size) not in made:
            settings = FAMILIES[name].overrides(tiny_pipelines[name], size)
            made[name, dtype, size] = make(*settings, f"model.dtype={dtype}")[:2]
        return made[name, dtype, size]

    return build


@pytest.fixture(scope="module")
def stock_of(tiny_pipelines):
    """The stock pipeline of a family, freshly loaded."""

    def load(name):
        pipe = FAMILIES[name].stock.from_pretrained(tiny_pipelines[name])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def asleep(policy):
    """LoRA's B back at zero: the base model."""
    with torch.no_grad():
        for name, parameter in policy.tuning.parameters().items():
            if "lora_B" in name:
                parameter.zero_()


def noise_of(policy, count):
    samples = [(i, 0) for i in range(count)]
    return gaussian_noise(policy.model.latent_shape, seed=1, iteration=0, samples=samples, step=0)


@torch.no_grad()
def sample(policy, guidance, sampler):
    """Latents of a rollout of PROMPTS through the run's own grid, and their images."""
    x = noise_of(policy, len(PROMPTS))
    embed = PromptEmbeddings(policy.model, [Prompt(text) for text in PROMPTS], folder=None, chunk=4)
    conditioned = ConditionedRows(*embed.shared([Prompt(text) for text in PROMPTS]), PROMPTS)
    field = conditioned.field(
        lambda x, sigma, conditioning: policy.model.velocity(x, sigma, conditioning, guidance)
    )
    for interval in intervals(policy.algorithm.schedule, STEPS):
        x = sampler.step(x, field(x, interval.sigma, False), interval).sample(torch.randn_like(x))
    return x, policy.model.decode(x)


def stock_sample(name, pipe, noise, guidance, size=(32, 32)):
    """The stock pipeline's latents and its images, of this height and width."""
    family = FAMILIES[name]
    call = {
        "height": size[0],
        "width": size[1],
        "num_inference_steps": STEPS,
        "max_sequence_length": family.length,
    }
    call |= {"guidance_scale": guidance, "latents": family.noise(noise), **family.arguments(STEPS)}
    latents = pipe(prompt=PROMPTS, output_type="latent", **call).images
    return latents, pipe(prompt=PROMPTS, output_type="pt", **call).images


@families
def test_conditioning_has_the_shapes_that_the_adapter_says(name, policy_of):
    """Plans without weights count by this. Mutation: forget CLIP's tokens beside T5's."""
    policy, data = policy_of(name, "float32")
    row = split(policy.embed(data.prompts[:1]))[0]
    shapes = {name: tuple(value.shape) for name, value in row.items()}
    assert shapes == policy.model.conditioning_shapes


@families
def test_noise_free_rollout_is_the_stock_pipelines(name, policy_of, stock_of):
    """Same noise, grid and guidance: latents and images agree to a relative 1e-4, for both samplers
    and no guidance.

    Mutation: swap rows and columns of token positions, forget the batch-norm statistics, scale the
    timestep, swap the chunks of the guidance.
    """
    policy, _ = policy_of(name, "float32")
    stock, found = stock_of(name), []
    for guidance in (1.0, FAMILIES[name].guidance):
        latents, images = stock_sample(name, stock, noise_of(policy, 3), guidance)
        for sampler in (FlowSDE(noise_level=0.0), CPS(noise_level=0.0)):
            x0, ours = sample(policy, guidance, sampler)
            x0 = FAMILIES[name].latents(x0, policy.model.vae)
            assert x0.shape == latents.shape
            found.append(float((x0 - latents).abs().max() / latents.abs().max()))
            found.append(float((ours - images).abs().max()))
    print(f"{name}: latents (relative) and images within {max(found):.1e} of stock diffusers'")
    assert all(distance <= 1e-4 for distance in found)


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
@distinct
def test_pictures_that_are_no_squares_are_the_stock_pipelines(name, size, policy_of, stock_of):
    """Wide and tall: latents and images agree to a relative 1e-4, on the grid that belongs to the
    number of tokens. Mutation: positions, unpacking or the grid by one side.
    """
    height, width = size
    policy, _ = policy_of(name, "float32", size)
    guidance = FAMILIES[name].guidance
    latents, images = stock_sample(name, stock_of(name), noise_of(policy, 3), guidance, size)
    x0, ours = sample(policy, guidance, ODE())
    assert x0.shape[2:] == (height // 4, width // 4)
    assert ours.shape == images.shape == (3, 3, height, width)
    x0 = FAMILIES[name].latents(x0, policy.model.vae)
    assert float((x0 - latents).abs().max() / latents.abs().max()) <= 1e-4
    assert float((ours - images).abs().max()) <= 1e-4


def replays(policy, part):
    """Per trained step: the log-ratio of a replay, how far its mean is from the rollout's, and the
    mean's KL.
    """
    likelihood = policy.algorithm.likelihood
    for index in range(len(part.trajectory.steps)):
        step = policy.objective.replay(part, index)
        assert step.mean.requires_grad
        old_mean = part.trajectory.old_mean[:, index]
        log_ratio = likelihood.log_ratio(step, old_mean, part.trajectory.x_next[:, index])
        drift = log_ratio.abs().max()
        yield drift, (step.mean - old_mean).abs().max(), likelihood.kl(step, old_mean).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@distinct
def test_replay_of_a_fresh_rollout(name, dtype, policy_of):
    """Ratio 1 bitwise in float32, and within the YAML's gate in bfloat16: guided or not,
    checkpointed or not, in any micro-batch.

    Mutation: replay without guidance, at sigma_next, or with LoRA weights in another dtype.
    """
    policy, data = policy_of(name, dtype)
    bound, found = 0.0 if dtype == "float32" else BFLOAT16_GATE, []
    for guidance, is_checkpointed in itertools.product(
        (1.0, FAMILIES[name].guidance), (False, True)
    ):
        policy.algorithm = replace(
            policy.algorithm, guidance_scale=guidance, training_guidance_scale=None
        )
        network = awake(policy).transformer
        if is_checkpointed:
            network.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()
        for rows in (range(0, 8), range(5, 6)):
            for drift, distance, kl in replays(policy, draw(policy, data.iterations[0], rows)):
                found += [drift.item(), kl.item()]
                assert distance == 0 or dtype == "bfloat16"
    print(f"{name}, {dtype}: log-ratio and KL of replays within {max(found):.1e}")
    assert all(value <= bound for value in found)
    asleep(policy)


class Brightness:
    """A reward that random images differ in."""

    def __call__(self, images, prompts):
        values = images.float().mean((1, 2, 3))
        return RewardOutput(values, torch.ones(len(prompts), dtype=torch.bool))


@distinct
def test_training_moves_lora_alone_and_its_export_gives_the_same_image(
    name, tiny_pipelines, stock_of, tmp_path
):
    """Two iterations: LoRA in float32 moves, the base stays bitwise; the export does the same in
    stock diffusers.

    Mutation: leave the base's requires_grad on, train in the base's dtype, drop alpha from the
    file's metadata.
    """
    settings = FAMILIES[name].overrides(tiny_pipelines[name])
    policy, data, _ = make(*settings, "optimizer.lr=1e-2", "optimizer.eps=1e-15")
    assert isinstance(policy.model, FlowModel)
    policy.reward.reward = Brightness()
    own = policy.tuning.parameters()
    before = {key: p.detach().clone() for key, p in policy.transformer.named_parameters()}
    assert {
        key for key, p in policy.transformer.named_parameters() if p.requires_grad
    } == own.keys()
    assert all(p.dtype == torch.float32 for p in own.values())
    fit(policy, data)
    after = dict(policy.transformer.named_parameters())
    assert all(torch.equal(before[key], after[key]) for key in before if key not in own)
    moved = {key for key in own if "lora_B" in key and not torch.equal(before[key], after[key])}
    assert len(moved) == len(own) // 2 - FAMILIES[name].num_idle

    policy.tuning.save(policy.model.pipeline, tmp_path)
    pipe, guidance = stock_of(name), FAMILIES[name].guidance
    _, base = stock_sample(name, pipe, noise_of(policy, 3), guidance)
    pipe.load_lora_weights(tmp_path)
    _, theirs = stock_sample(name, pipe, noise_of(policy, 3), guidance)
    _, ours = sample(policy, guidance, FlowSDE(noise_level=0.0))
    print(f"{name}: the exported LoRA's image within {float((ours - theirs).abs().max()):.1e}")
    assert (ours - theirs).abs().max() <= 1e-4
    assert (base - theirs).abs().max() > 1e-3


@distinct
def test_real_images_are_encoded_as_latents_are_decoded(name, policy_of):
    """What the autoencoder makes of an image, through latents of the adapter's scale. Mutations:
    leave out the scale, or turn it round; give the autoencoder images in [0, 1].
    """
    model = policy_of(name, "float32")[0].model
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = model.encode_images(images)
    assert latents.shape == (2, *model.latent_shape) and model.image_size == (32, 32)
    with torch.no_grad():
        mean = model.vae.encode(2 * images - 1).latent_dist.mean
        expected = (model.vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(latents), expected, rtol=0, atol=1e-5)
    # The networks' side is not the autoencoder's own.
    assert (latents - mean).abs().max() > 1e-3


@families
def test_text_encoders_are_freed_once_prompts_are_embedded(name, policy_of):
    """Without the garbage collector's help, which may come late. Mutation: keep the pipeline, or an
    encoder of it.
    """
    model = policy_of(name, "float32")[0].model
    parts = model.text.pipeline().components.items()
    encoders = [weakref.ref(part) for key, part in parts if key.startswith("text_encoder")]
    del parts
    assert encoders and all(isinstance(encoder(), torch.nn.Module) for encoder in encoders)
    gc.disable()
    try:
        PromptEmbeddings(model, [Prompt(text) for text in PROMPTS], folder=None, chunk=4)
        assert [encoder() is None for encoder in encoders] == [True] * len(encoders)
    finally:
        gc.enable()
