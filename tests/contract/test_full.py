"""Full fine-tuning: every weight moves, and the reference stays what the model was."""

import torch
from diffusers import SD3Transformer2DModel
from runs import fit, make

from flowrl.models import lora


def test_all_weights_move_and_the_reference_stays(tmp_path):
    """Gate, two iterations with a penalty, reference, export: the start's weights are untouched and come back bitwise.

    Mutation: train a copy, refer to the trained weights, or leave the start in place after a reference pass.
    """
    settings = ("tuning=full", "penalty=mean_squared", "optimizer.lr=1e-4", "num_threads=1", "data.prompts.count=8")
    policy, data, _ = make(*settings)
    before = {name: value.detach().clone() for name, value in policy.transformer.named_parameters()}
    assert lora.parameters(policy.transformer).keys() == before.keys()
    batch = data.iterations[0]
    part = policy.sample(batch, range(4))
    x, conditioning = part.trajectory.x0, part.group.conditioning
    base = policy.velocity(x, 0.5, conditioning).detach()
    fit(policy, data)
    assert policy.has_passed_gate
    after = dict(policy.transformer.named_parameters())
    still = {name for name in before if torch.equal(before[name], after[name])}
    # The last block discards its text stream's attention output, so that query gets no gradient; decay needs one too.
    assert all("attn.add_q_proj" in name or "norm_added_q" in name for name in still), still
    assert torch.equal(policy.reference.velocity(x, 0.5, conditioning), base)
    assert not torch.equal(policy.velocity(x, 0.5, conditioning), base)
    assert all(torch.equal(after[name], value) for name, value in policy.transformer.named_parameters())
    policy.model.save_lora(tmp_path)
    again = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert all(torch.equal(after[name], value) for name, value in again.named_parameters())
