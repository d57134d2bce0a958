"""Full fine-tuning: every weight moves, and the reference stays what the model was."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from lightning import Trainer
from runs import draw, fit, make
from safetensors.torch import save_file

from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import Stop
from flowrl.launch.errors import explain
from flowrl.models.sd3 import SD3
from flowrl.tuning import formats
from flowrl.tuning.full import Full, attach_whole
from flowrl.tuning.weights import swapped


def shapes_model():
    """The embedded model without an adapter."""
    return SD3(
        pretrained="embedded:pipeline",
        revision=None,
        dtype="float32",
        resolution=32,
        max_sequence_length=0,
        has_guidance=False,
        channels_last=True,
    )


def test_all_weights_move_and_the_reference_stays(tmp_path):
    """Gate, two iterations with a penalty, reference, export: the start's weights are untouched and
    come back bitwise.

    Mutation: train a copy, refer to the trained weights, or leave the start in place after a
    reference pass.
    """
    settings = (
        "tuning=full",
        "penalty=mean_squared",
        "optimizer.lr=1e-4",
        "num_threads=1",
        "data.prompts.count=8",
    )
    policy, data, _ = make(*settings)
    before = {name: value.detach().clone() for name, value in policy.transformer.named_parameters()}
    assert policy.tuning.parameters().keys() == before.keys()
    batch = data.iterations[0]
    part = draw(policy, batch, range(4))
    x, conditioning = part.trajectory.x0, part.conditioned.conditioning()
    base = policy.velocity(x, 0.5, conditioning).detach()
    fit(policy, data)
    assert policy.has_passed_gate
    after = dict(policy.transformer.named_parameters())
    still = {name for name in before if torch.equal(before[name], after[name])}
    # The last block discards its text stream's attention output, so that query gets no gradient;
    # decay needs one too.
    assert all("attn.add_q_proj" in name or "norm_added_q" in name for name in still), still
    assert torch.equal(policy.reference.velocity(x, 0.5, conditioning), base)
    assert not torch.equal(policy.velocity(x, 0.5, conditioning), base)
    assert all(
        torch.equal(after[name], value) for name, value in policy.transformer.named_parameters()
    )
    saver = Checkpoint(
        record=RunRecord(folder=str(tmp_path)), stop=Stop(), folder=str(tmp_path), every=1, keep=1
    )
    saver.export(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), policy)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert all(
        torch.equal(policy.ema.weights[name], value) for name, value in again.named_parameters()
    )

    fresh = shapes_model()
    tuning = attach_whole(fresh.transformer, tmp_path / "transformer")
    with swapped(policy.tuning.parameters(), policy.ema.weights):
        trained = policy.velocity(x, 0.5, conditioning)
    with torch.no_grad():
        assert torch.equal(fresh.velocity(x, 0.5, conditioning, 1.0), trained)
        with tuning.at_reference():
            assert torch.equal(fresh.velocity(x, 0.5, conditioning, 1.0), base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_half_the_bits_are_refused(dtype):
    """Mutation: train them, or let the first product of two dtypes end in a traceback."""
    with pytest.raises(Exception) as error:
        make("tuning=full", f"model.dtype={dtype}")
    text = explain(error.value)
    assert (
        text.startswith(f"model.dtype={dtype} with tuning=full") and "model.dtype=float32" in text
    )


def test_weights_that_are_not_what_the_configuration_says_are_refused():
    """Mutation: trust the configuration."""
    with pytest.raises(ValueError, match=r"weights in torch\.bfloat16; set model\.dtype=float32"):
        Full(dtype="float32").attach(shapes_model().transformer.bfloat16(), 0)


def test_a_whole_transformer_of_no_numbers_is_refused(tmp_path):
    """All names and shapes fit. Mutation: draw black pictures."""
    transformer = shapes_model().transformer
    weights = {name: value.detach().clone() for name, value in transformer.named_parameters()}
    weights["proj_out.bias"][1] = torch.nan
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"its weight 'proj_out.bias' holds NaN or infinity"):
        attach_whole(transformer, tmp_path)


def test_weights_of_another_network_are_named(tmp_path):
    """Mutation: take what fits, or go on with the base where there is nothing."""
    transformer = shapes_model().transformer
    with pytest.raises(ValueError, match="no transformer there"):
        attach_whole(transformer, tmp_path)
    save_file({"proj_out.bias": torch.zeros(3)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="do not fit this SD3Transformer2DModel"):
        attach_whole(transformer, tmp_path)
    with pytest.raises(ValueError, match=r"holds a whole transformer.*no LoRA"):
        formats.read(tmp_path)
