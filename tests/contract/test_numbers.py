"""Numbers that are none: they are never evaluated, saved or exported, and a run that learns nothing
says so.
"""

from dataclasses import replace

import pytest
import torch
from faults import Poison
from lightning import Trainer
from runs import awake, draw, make

from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import Stop
from flowrl.errors import NotFinite
from flowrl.runs import checkpoint
from flowrl.training.learning import NothingLearned
from flowrl.training.metric_means import Record
from flowrl.training.scoring import assign_advantages
from flowrl.types import RewardOutput

SMALL = ("num_threads=1", "viewing.every=0")


def train(policy, data, folder, *callbacks):
    """All iterations, with a checkpoint after each, of which one is kept; as `flowrl.launch.run`
    sets it up.
    """
    record = RunRecord(folder=str(folder))
    saver = Checkpoint(record=record, stop=Stop(), folder=str(folder), every=1, keep=1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, record, saver],
    )
    return trainer, saver


def score(function):
    """A reward in place of the shapes' one, from an image's mean brightness."""

    def reward(images, prompts):
        return RewardOutput(
            function(images.flatten(1).mean(1)), torch.ones(len(prompts), dtype=torch.bool)
        )

    return reward


@pytest.mark.parametrize("kind", ["lora", "ema"])
def test_the_last_good_checkpoint_stays(tmp_path, kind):
    """With `checkpoint.keep=1`, after NaN in the last iteration. Mutation: save first, or look at
    the LoRA alone.
    """
    policy, data, _ = make(*SMALL)
    trainer, saver = train(policy, data, tmp_path, Poison(after=2, kind=kind))
    with pytest.raises(NotFinite, match=rf"the weight .*lora_.* \({kind}\) holds NaN"):
        trainer.fit(policy, datamodule=data)
    (kept,) = checkpoint.list_with_state(tmp_path / "checkpoints")
    assert kept.name == "000001"
    weights, _ = checkpoint.load(kept)
    assert all(value.isfinite().all() for value in weights["lora"].values())
    with pytest.raises(NotFinite, match=kind):
        saver.export(trainer, policy)
    assert not (tmp_path / "lora").exists() and not (tmp_path / "lora.partial").exists()


def test_an_optimizer_s_state_is_looked_at(tmp_path):
    """Its moments would make the weights NaN one step later. Mutation: check the weights alone."""
    policy, data, _ = make(*SMALL, "num_iterations=1")
    trainer, saver = train(policy, data, tmp_path)
    trainer.fit(policy, datamodule=data)
    first = next(iter(trainer.optimizers[0].state.values()))
    first["exp_avg_sq"].view(-1)[0] = torch.inf
    with pytest.raises(NotFinite, match=r"the weight \d+.exp_avg_sq \(optimizer\)"):
        saver.save(trainer, policy)


@pytest.mark.parametrize("kind", ["lora", "ema"])
def test_no_such_weights_are_evaluated(kind):
    """Mutation: evaluate the average while the weights are NaN, or the other way round."""
    policy, _, evaluator = make(*SMALL, "evaluation.max_prompts=1")
    awake(policy)
    list(policy.weights()[kind].values())[3].data.view(-1)[0] = torch.nan
    with pytest.raises(NotFinite, match=rf"\({kind}\)"):
        evaluator.evaluate(policy)


def test_a_checkpoint_that_holds_nan_is_not_resumed(tmp_path):
    """As an earlier version wrote it. Mutation: go on from it, until the next gradient."""
    policy, data, _ = make(*SMALL, "num_iterations=1")
    trainer, _ = train(policy, data, tmp_path)
    trainer.fit(policy, datamodule=data)
    weights, state = checkpoint.load(tmp_path / "checkpoints" / "000001")
    next(iter(weights["ema"].values())).view(-1)[0] = torch.nan
    checkpoint.save(tmp_path / "checkpoints", keep=1, weights=weights, state=state)
    _, saver = train(policy, data, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"checkpoint .*000001: the weight ema .*lora_.* holds NaN.*; delete its folder",
    ):
        saver.resume_from(policy)


REWARDS = {
    "equal": (score(torch.zeros_like), [], "the rewards of each group were equal"),
    "missing": (
        lambda images, prompts: RewardOutput(
            torch.zeros(len(prompts)), torch.zeros(len(prompts), dtype=torch.bool)
        ),
        ["max_missing=1"],
        "no image has a reward",
    ),
    "absurd": (
        score(lambda value: value.sign() * 3e38),
        ["max_missing=1"],
        "no image has a reward",
    ),
    "no step": (score(torch.clone), ["optimizer.lr=1e-60"], "no optimizer step changed a weight"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_run_that_learns_nothing(name, tmp_path):
    """Whatever the reward gives, its metrics are numbers. Mutation: end such a run as any other."""
    reward, overrides, reason = REWARDS[name]
    policy, data, _ = make(*SMALL, *overrides)
    policy.reward.reward = reward
    trainer, saver = train(policy, data, tmp_path)
    trainer.fit(policy, datamodule=data)
    with pytest.raises(NothingLearned, match=f"nothing was learned in 2 iterations: {reason}"):
        policy.learning.check(policy.num_iterations)
    text = (tmp_path / "metrics.csv").read_text()
    assert "nan" not in text and "inf" not in text
    again, _, _ = make(*SMALL, *overrides)
    saver.resume_from(again)
    assert again.learning.met == policy.learning.met


@pytest.mark.parametrize(
    "loss", [["loss=dppo"], ["loss=nft", "sampler=ode", "rollout.shared_initial_noise=false"]]
)
def test_a_run_that_learns_slowly_is_none_of_them(loss, tmp_path):
    """Rewards that differ by 1e-6 and a learning rate of 1e-7. Mutation: a threshold on rewards or
    changes.
    """
    policy, data, _ = make(*SMALL, *loss, "optimizer.lr=1e-7")
    policy.reward.reward = score(lambda value: value * 1e-6)
    trainer, saver = train(policy, data, tmp_path)
    trainer.fit(policy, datamodule=data)
    policy.learning.check(policy.num_iterations)
    saver.export(trainer, policy)
    assert (tmp_path / "lora").is_dir()


def test_broken_images_are_left_out_of_the_averages(caplog):
    """One image of each batch is NaN. Mutation: an average of NaN, or of what NaN rounds to."""
    policy, _, evaluator = make(
        *SMALL, "max_missing=1", "evaluation.max_prompts=2", "evaluation.num_steps=2"
    )
    policy.reward.reward = score(torch.clone)
    whole = evaluator.evaluate(policy).metrics
    decode = policy.model.decode

    def broken(latents):
        images = decode(latents)
        images[0, 1, 2, 3] = torch.nan
        return images

    policy.model.decode = broken
    metrics = evaluator.evaluate(policy).metrics
    assert all(torch.tensor(value).isfinite() for value in metrics.values())
    names = [name for name in whole if "panel" in name or "diversity" in name]
    assert len(names) >= 5 and all(
        name in metrics and metrics[name] != whole[name] for name in names
    )
    assert "images have pixels that are no numbers" in caplog.text


def test_an_advantage_that_is_no_number_stops_the_run():
    """Whatever way of taking advantages gives it. Mutation: train on it until the gradient is NaN
    too.
    """
    policy, data, _ = make(*SMALL)
    part = draw(policy, data.iterations[0], range(8))
    method = policy.algorithm.advantage

    def broken(*arguments):
        return replace(method(*arguments), values=torch.full((8,), torch.nan))

    object.__setattr__(policy.algorithm, "advantage", broken)
    with pytest.raises(NotFinite, match="an advantage is NaN or infinite"):
        assign_advantages(policy, [part], Record())
