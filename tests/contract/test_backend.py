"""Options of how networks are run: each does what it says, and none changes what is computed beyond
rounding.
"""

import pytest
import torch
from diffusers.models import attention_dispatch
from runs import awake, draw, fit, make
from tiny import FAMILIES
from torch import _dynamo, nn

from flowrl.errors import UserError
from flowrl.models import backend

# Dynamo looks at the gradient of tensors that are no leaves, and hides the warning from all but
# this suite.
traced = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CHECKPOINTED, PLAIN = "backend.gradient_checkpointing=true", "backend.gradient_checkpointing=false"


@pytest.fixture
def make_policy(tiny_pipelines):
    """Policy and data of a family's small pipeline with LoRA weights away from zero."""

    def build(name, *overrides):
        policy, data, _ = make(*FAMILIES[name].overrides(tiny_pipelines[name]), PLAIN, *overrides)
        return awake(policy), data

    return build


@pytest.fixture
def eager_compiler(monkeypatch):
    """Compilation that traces a block and guards its programs as inductor's does, and runs
    PyTorch's own operators.
    """
    _dynamo.reset()
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda block: compile_in_place(block, backend="eager")
    )
    yield
    _dynamo.reset()


@pytest.fixture
def attention_kept():
    """diffusers keeps the last backend that was set for networks to come."""
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    yield
    attention_dispatch._AttentionBackendRegistry._active_backend = before


def gradients(policy, part):
    """Of the squared means of a rollout's trained steps, by LoRA parameter; and how far the replay
    was from the rollout.
    """
    drift = 0.0
    policy.transformer.zero_grad()
    for index in range(len(part.trajectory.steps)):
        step = policy.objective.replay(part, index)
        drift = max(
            drift, float((step.mean.detach() - part.trajectory.old_mean[:, index]).abs().max())
        )
        step.mean.square().mean().backward()
    own = policy.tuning.parameters()
    return {key: p.grad.clone() for key, p in own.items() if p.grad is not None}, drift


def agree(ours, theirs, tolerance):
    scale = max(value.norm() for value in theirs.values())
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).norm() <= tolerance * scale for key in theirs)


def check_compiled(name, make_policy, tolerance):
    """A compiled policy gives the plain one's rollout and gradients, replays bitwise, and keeps its
    programs.
    """
    plain, data = make_policy(name)
    compiled, _ = make_policy(name, "backend.compile=true")
    assert compiled.tuning.parameters().keys() == plain.tuning.parameters().keys()
    wanted = draw(plain, data.iterations[0], range(8))
    part = draw(compiled, data.iterations[0], range(8))
    x, x_wanted = part.trajectory.x_next, wanted.trajectory.x_next
    assert (x - x_wanted).abs().max() <= tolerance * x_wanted.abs().max()
    found, drift = gradients(compiled, part)
    assert drift == 0
    agree(found, gradients(plain, wanted)[0], tolerance)

    count = _dynamo.utils.counters["stats"]["unique_graphs"]
    assert count > 0
    fresh = draw(compiled, data.iterations[1], range(8))
    assert gradients(compiled, fresh)[1] == 0
    assert _dynamo.utils.counters["stats"]["unique_graphs"] == count


@traced
def test_compiled_blocks_compute_the_same(make_policy, eager_compiler):
    """Rollout, replay and gradients, with and without gradients and guidance; the second iteration
    compiles nothing.

    Mutation: compile nothing, compile the module's call so that weights change their names, or let
    a program depend on sigma.
    """
    check_compiled("flux2_klein", make_policy, tolerance=0.0)


@pytest.mark.slow
@traced
@pytest.mark.parametrize("name", ["sd3", "flux1"])
def test_inductor_computes_the_same(name, make_policy):
    """Through inductor, whose kernels round otherwise. Mutation: the same."""
    _dynamo.reset()
    check_compiled(name, make_policy, tolerance=1e-5)
    _dynamo.reset()


@pytest.mark.slow
@traced
def test_inductor_replays_bfloat16(make_policy):
    """Programs with and without gradients round alike. Mutation: leave inductor its float32 between
    operators.
    """
    _dynamo.reset()
    policy, data = make_policy("flux2_klein", "backend.compile=true", "model.dtype=bfloat16")
    assert gradients(policy, draw(policy, data.iterations[0], range(8)))[1] == 0
    _dynamo.reset()


@pytest.mark.slow
@traced
def test_a_compiled_run_trains(make_policy, eager_compiler):
    """Checkpointed, against the reference behind LoRA, through the start-up gate.

    Mutation: recompile until PyTorch gives up, which raises here.
    """
    with _dynamo.config.patch(fail_on_recompile_limit_hit=True):
        policy, data = make_policy(
            "sd3", "backend.compile=true", CHECKPOINTED, "penalty=kl", "debug=smoke"
        )
        before = {key: p.detach().clone() for key, p in policy.tuning.parameters().items()}
        fit(policy, data)
    assert any(not torch.equal(before[key], p) for key, p in policy.tuning.parameters().items())


@pytest.mark.parametrize("name", ["flux1", "flux2_klein"])
def test_an_attention_backend_is_used(name, make_policy, attention_kept):
    """PyTorch's plain attention in place of its choice: set in every block, and equal to rounding.

    Mutation: accept the option and set nothing.
    """
    default, data = make_policy(name)
    wanted = gradients(default, draw(default, data.iterations[0], range(4)))[0]
    policy, _ = make_policy(name, "backend.attention=_native_math")
    chosen = {
        processor._attention_backend.value
        for processor in policy.transformer.attn_processors.values()
    }
    assert chosen == {"_native_math"}
    found, drift = gradients(policy, draw(policy, data.iterations[0], range(4)))
    assert drift == 0
    agree(found, wanted, 1e-4)


def test_a_network_that_always_uses_pytorchs_attention_takes_its_kernels(make_policy):
    """The plain one: equal to rounding, and the next model has PyTorch's own choice again.

    Mutations: accept the option and set nothing, or leave the other kernels switched off.
    """
    default, data = make_policy("sd3")
    wanted = gradients(default, draw(default, data.iterations[0], range(4)))[0]
    policy, _ = make_policy("sd3", "backend.attention=_native_math")
    kernels = torch.backends.cuda
    assert kernels.math_sdp_enabled() and not kernels.flash_sdp_enabled()
    found, drift = gradients(policy, draw(policy, data.iterations[0], range(4)))
    assert drift == 0
    agree(found, wanted, 1e-4)
    make_policy("sd3")
    assert kernels.math_sdp_enabled() and kernels.flash_sdp_enabled()


def test_variants_name_overrides_that_hold_within_them(make_policy):
    """Mutation: yield gradient checkpointing where there is none, or restore nothing."""
    policy, _ = make_policy("sd3", CHECKPOINTED)
    found = dict(backend.variants(policy.transformer))
    assert next(iter(found)) == "backend.gradient_checkpointing=false" and len(found) == 5
    with found["backend.gradient_checkpointing=false"]:
        assert len(list(backend.variants(policy.transformer))) == 4
    assert policy.transformer.is_gradient_checkpointing


def test_blocks_are_recomputed_in_updates_alone(make_policy):
    """Mutation: checkpoint in rollouts too, or never."""

    def passes(*overrides):
        policy, data = make_policy("flux1", *overrides)
        seen = []
        policy.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda *_: seen.append(0)
        )
        part = draw(policy, data.iterations[0], range(4))
        in_rollout = len(seen)
        gradients(policy, part)
        return in_rollout, len(seen) - in_rollout

    rollout, update = passes(PLAIN)
    assert passes(CHECKPOINTED) == (rollout, 2 * update)


def decoded(policy, count=3):
    """Images of seeded latents, and the shapes that the decoder was given."""
    seen = []
    handle = policy.model.vae.decoder.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    latents = torch.randn(
        count, *policy.model.latent_shape, generator=torch.Generator().manual_seed(0)
    )
    images = policy.model.decode(latents)
    handle.remove()
    return images, seen


@pytest.mark.parametrize("name", FAMILIES)
def test_sliced_decoding_is_one_image_at_a_time(name, make_policy):
    """Mutation: ignore the option."""
    whole, at_once = decoded(make_policy(name, "backend.slice_decoding=false")[0])
    sliced, pieces = decoded(make_policy(name, "backend.slice_decoding=true")[0])
    assert len(at_once) == 1 and [shape[0] for shape in pieces] == [1, 1, 1]
    assert (whole - sliced).abs().max() <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_tiled_decoding_is_in_pieces(name, make_policy):
    """Images above the size from which the autoencoder divides them, here 32 pixels. Mutation:
    ignore the option.
    """

    def shapes(*overrides):
        policy, _ = make_policy(name, "model.resolution=64", "grid.tokens=64", *overrides)
        policy.model.vae.tile_sample_min_size, policy.model.vae.tile_latent_min_size = 32, 8
        images, seen = decoded(policy, count=1)
        assert images.shape == (1, 3, 64, 64)
        return [shape[-1] for shape in seen]

    assert shapes("backend.tile_decoding=false") == [16]
    assert len(pieces := shapes("backend.tile_decoding=true")) > 1 and max(pieces) == 8


def test_an_option_that_a_network_does_not_have_is_named():
    """Mutation: let diffusers' error through, which names no key."""

    def switch():
        raise NotImplementedError("Slicing doesn't seem to be implemented for Whole.")

    with pytest.raises(UserError, match=r"backend.slice_decoding=true: Slicing .*set it to false"):
        backend._switch_on("slice_decoding", switch)


def test_precision_and_threads_are_those_of_the_run(make_policy, monkeypatch):
    """The next run of a process has its own. PyTorch is told the threads only where they differ:
    the call itself slows attention on some processors.

    Mutations: leave PyTorch's precision as it is, or tell the threads in any case.
    """
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    before = torch.get_num_threads()
    make_policy("sd3", "matmul_precision=high", f"num_threads={before}")
    assert torch.get_float32_matmul_precision() == "high" and told == []
    make_policy("sd3", f"num_threads={before + 1}")
    assert torch.get_float32_matmul_precision() == "highest" and told == [before + 1]
