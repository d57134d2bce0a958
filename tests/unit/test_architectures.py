"""The released architectures on the meta device: their size, and where each recipe's LoRA goes."""

import json
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from runs import CONF

from flowrl.launch.checks import check_deadlines, check_guidance
from flowrl.launch.compose import register_resolvers
from flowrl.models.architectures import ARCHITECTURES, is_listed, on_meta
from flowrl.objectives import check_method, stochastic_steps

PARAMETERS = {
    "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520,
    "flux1_dev": 11_901_408_320,
    "flux2_klein_4b": 3_875_544_576,
    "flux2_klein_9b": 9_078_581_248,
    "flux2_dev": 32_223_281_152,
}
SAME = {"flux2_klein_base_4b": "flux2_klein_4b", "flux2_klein_base_9b": "flux2_klein_9b"}
OPTIONS = (*PARAMETERS, *SAME)
"""Options whose adapter is written by hand."""
ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


@cache
def config(option):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["name=test", f"model={option}"])


def expected(option):
    """The linear layers that the published recipes train, spelt out."""
    double, single = {
        "sd35_medium": (24, 0),
        "sd35_large": (38, 0),
        "flux1_dev": (19, 38),
        "flux2_klein_4b": (5, 20),
        "flux2_klein_9b": (8, 24),
        "flux2_dev": (8, 48),
    }[option]
    blocks = [f"transformer_blocks.{i}" for i in range(double)]
    names = {f"{block}.attn.{part}" for block in blocks for part in ATTENTION}
    if option.startswith("sd35"):
        return names - {
            f"{blocks[-1]}.attn.to_add_out"
        }  # the last block's text stream ends in its attention
    layers = ("net.0.proj", "net.2") if option == "flux1_dev" else ("linear_in", "linear_out")
    names |= {
        f"{block}.{stream}.{part}"
        for block in blocks
        for stream in ("ff", "ff_context")
        for part in layers
    }
    parts = ("to_q", "to_k", "to_v") if option == "flux1_dev" else ("to_qkv_mlp_proj", "to_out")
    return names | {
        f"single_transformer_blocks.{i}.attn.{part}" for i in range(single) for part in parts
    }


@pytest.mark.parametrize("option", PARAMETERS)
def test_size_and_lora_of_each_model(option):
    """Parameter counts of the released weights; LoRA on exactly the published layers, in float32 on
    a bfloat16 base.

    Mutation: any argument of an architecture; a bare `to_out` suffix, or `to_out.0` alone, in
    FLUX.2's targets.
    """
    cfg = config(option)
    transformer = on_meta(cfg.model.pretrained, torch.bfloat16)
    assert sum(p.numel() for p in transformer.parameters()) == PARAMETERS[option]
    with torch.device("meta"):
        own = instantiate(cfg.lora).attach(transformer, seed=0).parameters()
    found = {name.split(".lora_")[0] for name in own}
    assert found == expected(option)
    assert {p.dtype for p in own.values()} == {torch.float32}
    rank = {value.shape[0] for name, value in own.items() if "lora_A" in name}
    assert rank == {cfg.lora.rank}


@pytest.mark.parametrize(("base", "distilled"), SAME.items())
def test_base_and_distilled_models_are_made_alike(base, distilled):
    """Mutation: give one of a pair another architecture or other LoRA targets."""
    first, second = config(base), config(distilled)
    assert ARCHITECTURES[first.model.pretrained] == ARCHITECTURES[second.model.pretrained]
    assert first.lora == second.lora and first.model.has_guidance and not second.model.has_guidance


@pytest.mark.parametrize(
    ("option", "count"),
    [
        ("sd35_medium", 191),
        ("sd35_large", 303),
        ("flux1_dev", 342),
        ("flux2_klein_4b", 100),
        ("flux2_klein_9b", 144),
        ("flux2_dev", 192),
    ],
)
def test_number_of_lora_layers(option, count):
    """By hand: 24 x 8 - 1, 38 x 8 - 1, 19 x 12 + 38 x 3, 5 x 12 + 20 x 2, 8 x 12 + 24 x 2, 8 x 12 +
    48 x 2.

    Mutation: lose a line of the list above.
    """
    assert len(expected(option)) == count


@pytest.mark.parametrize("option", OPTIONS)
def test_each_model_is_ready_to_run(option):
    """The adapter's class, the grid at the published size, and steps that a ratio loss may train
    on.

    Mutation: a step range that reaches a model's last step, FLUX.2 on FLUX.1's grid.
    """
    cfg = config(option)
    assert cfg.model.pretrained in ARCHITECTURES and cfg.model.dtype == "bfloat16"
    assert get_class(cfg.model["_target_"]).__module__.startswith("flowrl.models.")
    assert cfg.grid.tokens == 1024
    method = instantiate(cfg.algorithm)
    rule = {"flux1_dev": "linear"}.get(option, "empirical")
    assert getattr(method.schedule, "rule", None) == (None if option.startswith("sd35") else rule)
    assert set(stochastic_steps(method, iteration=0, seed=0, prompt=0)) <= set(
        range(cfg.rollout.num_steps - 1)
    )
    assert cfg.gate_tolerance <= cfg.trust.delta / 2


RECIPES = {
    "flow_dppo_sd35": ("CPS", 0.7, 1e-6, 3, 1024),
    "flow_dppo_flux2": ("FlowSDE", 0.7, 1e-6, 3, 1536),
    "flow_dppo_sd35_multi": ("CPS", 0.7, 1e-6, 3, 1024),
    "flow_dppo_flux2_multi": ("FlowSDE", 0.7, 1e-6, 3, 1536),
    "flow_dppo_flux1": ("CPS", 0.8, 1e-5, 3, 1152),
    "flow_grpo_sd35": ("FlowSDE", 0.7, None, 9, 1152),
    "flow_grpo_flux1": ("FlowSDE", 0.9, None, 5, 1152),
    "flow_grpo_flux2": ("FlowSDE", 0.5, None, 1, 768),
    "grpo_guard_sd35": ("FlowSDE", 0.7, None, 9, 1152),
    "diffusion_nft_sd35": ("DPM2", None, None, 0, 1152),
    "draft_sd35": ("ODE", None, None, 0, 64),
    "sol_rl_sd35_large": ("DPM2", None, None, 0, 1152),
    "flow_dppo_sd35_teacher": ("CPS", 0.8, 1e-6, 3, 1152),
    "diffusion_opd_sd35": ("FlowSDE", 0.7, None, 9, 72),
    "flow_dppo_qwen_image_edit": ("FlowSDE", 0.7, 1e-5, 3, 768),
    "flow_dppo_qwen_image": ("FlowSDE", 1.2, 1e-5, 2, 512),
    "flow_grpo_z_image": ("FlowSDE", 0.7, None, 1, 768),
    "diffusion_nft_sana15": ("ODE", None, None, 0, 1152),
}
"""Sampler, noise level, threshold, trained steps and images an iteration, as the authors have them.
"""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_carry_the_authors_numbers(name):
    """Mutation: any of these numbers in its YAML, or a method that its own rules refuse."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["name=test", f"experiment={name}"])
    check_guidance(cfg)
    method = instantiate(cfg.algorithm)
    check_method(method)
    plan = instantiate(cfg.batch)
    found = (type(method.sampler).__name__, getattr(method.sampler, "noise_level", None))
    steps = stochastic_steps(method, iteration=0, seed=0, prompt=0)
    found += (getattr(method.loss, "delta", None), len(steps), plan.num_samples)
    assert found == RECIPES[name]
    assert not method.shared_initial_noise
    assert cfg.optimizer.lr == (1e-4 if name == "grpo_guard_sd35" else 3e-4)
    has_own_std = name in (
        "flow_dppo_flux1",
        "flow_grpo_flux2",
        "flow_grpo_z_image",
        "grpo_guard_sd35",
        "diffusion_opd_sd35",  # which looks at no advantage
    )
    usual = "gdpo" if name.endswith("_multi") else "global_std"
    assert method.advantage.func.__name__ == ("group" if has_own_std else usual)
    assert (list(cfg.optimizer.betas), cfg.optimizer.eps) == ([0.9, 0.999], 1e-8)


@pytest.mark.parametrize("name", ["flow_dppo_sd35_multi", "flow_dppo_flux2_multi"])
def test_recipes_of_four_rewards(name):
    """PickScore, CLIP, GenEval2 and HPSv2.1, equally weighted, on prompts that carry GenEval2's
    questions.

    Mutation: a weight, another scorer, HPSv2 of another version, or prompts without questions.
    """
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(
            "config", overrides=["name=test", f"experiment={name}", "data.prompts.count=2"]
        )
    check_deadlines(cfg)
    assert cfg.reward.weights == dict.fromkeys(
        ("pickscore", "clip_score", "geneval2", "hpsv2"), 1.0
    )
    assert cfg.reward.rewards.keys() == cfg.reward.weights.keys()
    files = {
        name: reward.get("pretrained") or reward.get("weights")
        for name, reward in cfg.reward.rewards.items()
    }
    files["geneval2"] = cfg.reward.rewards.geneval2.judge.model
    assert files == {
        "pickscore": "yuvalkirstain/PickScore_v1",
        "clip_score": "openai/clip-vit-large-patch14",
        "geneval2": "Qwen/Qwen3-VL-8B-Instruct",
        "hpsv2": "xswu/HPSv2/HPS_v2.1_compressed.pt",
    }
    assert cfg.reward.rewards.geneval2.mean == "geometric"
    prompts = [*instantiate(cfg.data.prompts), *instantiate(cfg.evaluation.sets.held_in)]
    assert all(prompt.metadata["vqa_list"] for prompt in prompts)


def test_grid_tokens_follow_the_resolution():
    """Mutation: a fixed number of tokens in the YAML, or the square of one side."""
    register_resolvers()
    for resolution, tokens in (("1024", 4096), ("[512,768]", 32 * 48)):
        size = f"model.resolution={resolution}"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=["name=test", "model=flux1_dev", size])
        assert cfg.schedule.tokens == tokens


def test_an_unlisted_architecture_is_named():
    """Mutation: a KeyError."""
    with pytest.raises(ValueError, match=r"org/other: unknown architecture"):
        on_meta("org/other", torch.float32)


def test_a_folder_of_another_class_is_named(tmp_path):
    """Mutation: a StopIteration or a KeyError."""
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    for content, found in (
        ({"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
        ({}, "None"),
    ):
        config.write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=f"{config.parent} holds a {found}; known are SD3Transformer"
        ) as error:
            on_meta(str(tmp_path), torch.float32)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "is_known"), [("SD3Transformer2DModel", True), ("LTXVideoTransformer3DModel", False)]
)
def test_a_folders_transformer_may_be_of_a_class_that_is_not_listed(kind, is_known, tmp_path):
    """A derived model's. Mutation: refuse the folder."""
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": kind, "num_layers": 1}))
    assert is_listed(str(tmp_path)) == is_known
