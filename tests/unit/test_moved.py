"""Runs that began under an earlier version name targets where they stood then."""

import pytest
from hydra.utils import get_object

from flowrl.launch.moved import MOVED, current_name, move
from flowrl.launch.saved import read_saved

EARLIER = [
    "flowrl.advantages.gdpo",
    "flowrl.advantages.global_std",
    "flowrl.advantages.group",
    "flowrl.advantages.zscore",
    "flowrl.algorithm.Algorithm",
    "flowrl.batch_plan.BatchPlan",
    "flowrl.callbacks.progress.Progress",
    "flowrl.data.PromptData",
    "flowrl.diagnostics.Diagnostics",
    "flowrl.ema.EMA",
    "flowrl.evaluation.Evaluator",
    "flowrl.gaussian.Likelihood",
    "flowrl.learning_rate.constant",
    "flowrl.learning_rate.cosine",
    "flowrl.losses.dppo.DPPO",
    "flowrl.losses.grpo.grpo",
    "flowrl.losses.guard.guard",
    "flowrl.losses.nft.NFT",
    "flowrl.losses.reference.ReferencePenalty",
    "flowrl.models.backend.Backend",
    "flowrl.models.embeddings.PromptEmbeddings",
    "flowrl.models.flux1.Flux1",
    "flowrl.models.flux2.Flux2Dev",
    "flowrl.models.flux2.Flux2Klein",
    "flowrl.models.full.Full",
    "flowrl.models.lora.LoRA",
    "flowrl.models.sd3.SD3",
    "flowrl.modules.parallel.parts",
    "flowrl.modules.parallel.replicas",
    "flowrl.prompts.compositions.composition_prompts",
    "flowrl.prompts.jsonl.jsonl_prompts",
    "flowrl.prompts.shapes.shapes_prompts",
    "flowrl.prompts.text.text_prompts",
    "flowrl.rewards.clip_score.CLIPScore",
    "flowrl.rewards.mixture.Mixture",
    "flowrl.rewards.shapes.ShapesReward",
    "flowrl.samplers.cps.CPS",
    "flowrl.samplers.dpm2.DPM2",
    "flowrl.samplers.ode.ODE",
    "flowrl.samplers.sde.FlowSDE",
    "flowrl.samplers.steps.Window",
    "flowrl.schedule.LinearShift",
    "flowrl.serving.app.Limits",
    "flowrl.trackers.wandb_logger",
]
"""Targets of the configurations at 09c2979."""


@pytest.mark.parametrize("target", EARLIER)
def test_every_earlier_target_is_found(target):
    """Mutation: move a module without a line in the table."""
    assert callable(get_object(current_name(target)))


@pytest.mark.parametrize(
    ("old", "new"), [("grpo.grpo", "grpo.GRPO"), ("guard.guard", "guard.Guard")]
)
def test_functions_that_became_classes_are_made_at_once(old, new):
    """Mutation: keep `_partial_`, which would hand over the class itself."""
    node = {"_target_": f"flowrl.losses.{old}", "_partial_": True, "clip_low": 0.1}
    assert move(node) == {"_target_": f"flowrl.losses.{new}", "clip_low": 0.1}
    assert move({"_target_": ["a"]}) == {"_target_": ["a"]}


def test_only_what_moved_is_renamed():
    """Mutation: rename by prefix, which would move what stands beside."""
    assert current_name("flowrl.database.X") == "flowrl.database.X"
    assert (
        current_name("flowrl.evaluation.evaluator.Evaluator")
        == "flowrl.evaluation.evaluator.Evaluator"
    )
    assert not set(MOVED.values()) & set(MOVED)


def test_targets_are_renamed_at_every_depth_and_nothing_else(tmp_path):
    old = {
        "a": [{"_target_": "flowrl.ema.EMA", "decay": "${x}"}],
        "b": {"_target_": "mine.X", "t": "flowrl.ema.EMA"},
    }
    new = {"a": [old["a"][0] | {"_target_": "flowrl.training.ema.EMA"}], "b": old["b"]}
    assert move(old) == new
    path = tmp_path / "source.yaml"
    path.write_text("ema:\n  _target_: flowrl.ema.EMA\n  every: ${num}\nnum: ???\n")
    saved = read_saved(path, "")
    assert saved._get_node("ema")._get_node("_target_")._value() == "flowrl.training.ema.EMA"
    assert saved._get_node("ema")._get_node("every")._value() == "${num}"


def test_older_targets_are_given_the_keys_that_they_lack():
    """A window that jumps by its size and begins anew, and every stochastic step trained, as they
    did; a run's own values stay.

    Mutation: leave them out, or replace what is there.
    """
    window = {"_target_": "flowrl.samplers.steps.Window", "size": 2, "advance_every": 5}
    added = {"stride": None, "rolls_back": True, "shrinks": False}
    assert move(window) == window | added
    assert move(window | {"stride": 1, "shrinks": True})["stride"] == 1
    algorithm = move({"_target_": "flowrl.algorithm.Algorithm", "num_steps": 6})
    assert algorithm["trained"] == {"_target_": "flowrl.samplers.trained.AllStochastic"}
    assert algorithm["credit"] == "trajectory" and algorithm["training_guidance_scale"] is None
    algorithm["trained"]["_target_"] = "mine"
    again = move({"_target_": "flowrl.algorithm.Algorithm"})
    assert again["trained"]["_target_"] != "mine"
    for name in ("flux1.Flux1", "flux2.Flux2Dev", "flux2.Flux2Klein"):
        model = {"_target_": f"flowrl.models.{name}", "has_guidance": True}
        assert move(model) == model | {"channels_last": False}
