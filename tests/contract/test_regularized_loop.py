"""Data regularisation on the embedded model: real latents, a loss that falls, and what is
refused.
"""

import numpy as np
import pytest
import torch
from runs import composed, fit, make
from typing_extensions import get_protocol_members

from flowrl.errors import UserError
from flowrl.images.captioned import fitted
from flowrl.launch.regularizer import check_encoder, check_regularizer
from flowrl.models.protocol import FlowModel
from flowrl.shapes.grammar import parse
from flowrl.shapes.verify import verify
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.data_regularizer import DataRegularizer

PLAIN = ("num_threads=1", "evaluation.max_prompts=2", "num_iterations=1")
SMALL = (*PLAIN, "regularizer=shapes", "regularizer.images.count=12", "regularizer.batch=4")


class Blind:
    """A model that does all that another does but encode images."""

    def __init__(self, model):
        for name in get_protocol_members(FlowModel):
            setattr(self, name, getattr(model, name))


@pytest.fixture(scope="module")
def regularized():
    """A policy after its first iteration, and the metrics of this."""
    policy, data, _ = make(*SMALL)
    rows = []
    policy.report = rows.append
    fit(policy, data)
    return policy, rows[0]


def test_latents_lead_back_to_the_scenes(regularized):
    """The verifier finds what the captions say. Mutation: leave out the scaling, or take images
    in [0, 1] for the autoencoder's own.
    """
    policy, _ = regularized
    scenes = policy.regularizer.images
    pixels = torch.stack([torch.from_numpy(fitted(scene.read(), 32, 32)) for scene in scenes])
    latents = policy.model.encode_images(pixels)
    # Scaled as the rollouts' latents are, which end at about unit variance.
    assert 0.8 < latents.std() < 1.2
    images = policy.model.decode(latents)
    assert (images - pixels).abs().mean() < 0.02
    verdicts = verify(
        images.permute(0, 2, 3, 1).numpy(), [parse(scene.caption) for scene in scenes]
    )
    assert np.mean([verdict.strict for verdict in verdicts]) > 0.9


def test_an_iteration_trains_on_samples_and_on_images(regularized):
    """Its loss is far below that of no network, which is about 2, and its images are encoded: two
    updates of four. Mutation: skip the passes, or record the weighted loss.
    """
    policy, row = regularized
    assert 0.1 < row["loss/data"] < 1
    assert len(policy.regularizer._latents) == 8
    assert "loss/policy" in row


def test_the_rest_of_an_iteration_is_what_it_is_without(regularized):
    """The same samples and rewards, and other weights. Mutation: share noise with rollouts."""
    policy, row = regularized
    plain, data, _ = make(*PLAIN)
    rows = []
    plain.report = rows.append
    fit(plain, data)
    assert rows[0]["reward/mean"] == row["reward/mean"] and "loss/data" not in rows[0]
    ours, theirs = policy.tuning.parameters(), plain.tuning.parameters()
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)


PLAN = {"prompts_per_iteration": 3, "group_size": 2, "updates_per_iteration": 1}
PLAN |= {"inner_epochs": 1, "max_micro_batch": 2}


def test_a_model_that_cannot_encode_is_refused_before_weights_load(regularized):
    """Mutation: look at the loaded model alone."""
    subject = regularized[0].regularizer
    plan = BatchPlan(num_processes=1, **PLAN)
    with pytest.raises(UserError, match="for which Derived has no encode_images; give it one"):
        check_regularizer(composed("model=qwen_image"), subject, plan)
    check_regularizer(composed("model=qwen_image"), None, plan)
    check_regularizer(composed("model=shapes"), subject, plan)
    with pytest.raises(UserError, match="scene 0: 32 x 32 pixels are fewer than the model's 512"):
        check_regularizer(composed("model=sd35_medium"), subject, plan)
    with pytest.raises(UserError, match="do not split over 3 processes"):
        check_regularizer(composed(), subject, BatchPlan(num_processes=3, **PLAN))


def test_a_loaded_model_is_looked_at_too(regularized):
    """As one that a function makes. Mutation: look at its class alone."""
    policy, _ = regularized
    check_encoder(policy.regularizer, policy.model)
    model = Blind(policy.model)
    check_encoder(None, model)
    with pytest.raises(UserError, match="for which Blind has no encode_images"):
        check_encoder(policy.regularizer, model)


def test_it_goes_with_losses_of_every_kind():
    """Over noised samples, and with the reward's own gradient. Mutation: ask any of them for
    stochastic steps.
    """
    for method in ("diffusion_nft", "draft"):
        policy, data, _ = make(f"experiment={method}", *SMALL)
        rows = []
        policy.report = rows.append
        fit(policy, data)
        assert isinstance(policy.regularizer, DataRegularizer)
        assert 0.05 < rows[0]["loss/data"] < 2
