"""The options over `derived` on the meta device: sizes as published, LoRA on the published layers,
and numbers that a run may begin with.
"""

from functools import cache

import pytest
from count_parameters import count, network_of, options
from hydra.utils import instantiate
from runs import composed

from flowrl.errors import UserError
from flowrl.launch.checks import check_guidance
from flowrl.models.architectures import ARCHITECTURES
from flowrl.models.published import PUBLISHED
from flowrl.objectives import check_method

SIZES = {
    # Of the weights on the hub, and, where only that is known, of the authors' page (SANA: 1604M of
    # its model zoo; HunyuanVideo: "over 13 billion" of its report).
    "qwen_image": 20_430_401_088,
    "qwen_image_edit_plus": 20_430_401_088,
    "z_image": 6_154_908_736,
    "z_image_turbo": 6_154_908_736,
    "sana15_1600m": 1_604_000_000,
    "flux1_kontext": 11_901_408_320,
    "wan21_t2v_1300m": 1_418_996_800,
    "wan21_t2v_14b": 14_288_491_584,
    "wan22_t2v_a14b": 2 * 14_288_491_584,
    "wan22_ti2v_5b": 4_999_787_712,
    "hunyuan_video": 13_000_000_000,
    "ltx_video": 1_923_385_472,
}
LORA = {
    # Layers: blocks times layers a block. Parameters: rank times inputs and outputs of all layers.
    "qwen_image": (60 * 12, 64 * 60 * (8 * 2 * 3072 + 4 * 5 * 3072)),
    "qwen_image_edit_plus": (60 * 8, 64 * 60 * 8 * 2 * 3072),
    "z_image": (34 * 7, 64 * 34 * (4 * 2 * 3840 + 3 * (3840 + 10240))),
    "z_image_turbo": (34 * 7, 64 * 34 * (4 * 2 * 3840 + 3 * (3840 + 10240))),
    "sana15_1600m": (20 * 8, 4 * 20 * 8 * 2 * 2240),
    "flux1_kontext": (19 * 12 + 38 * 3, 64 * (19 * (8 * 2 + 4 * 5) + 38 * 3 * 2) * 3072),
    "wan21_t2v_1300m": (30 * 8, 32 * 30 * 8 * 2 * 1536),
    "wan21_t2v_14b": (40 * 10, 64 * 40 * (8 * 2 * 5120 + 2 * (5120 + 13824))),
    "wan22_t2v_a14b": (2 * 40 * 10, 2 * 64 * 40 * (8 * 2 * 5120 + 2 * (5120 + 13824))),
    "wan22_ti2v_5b": (30 * 8, 64 * 30 * 8 * 2 * 3072),
    "hunyuan_video": (
        20 * 12 + 40 * 3 + 2 * 6,
        64 * 3072 * (20 * (8 * 2 + 4 * 5) + 40 * 3 * 2 + 2 * (4 * 2 + 2 * 5)),
    ),
    "ltx_video": (28 * 8, 32 * 28 * 8 * 2 * 2048),
}


@cache
def config(option):
    return composed(f"model={option}")


@pytest.mark.parametrize("option", SIZES)
def test_a_model_and_its_lora_are_as_published(option):
    """The model within 2 percent, and of weights on the hub exactly; the LoRA's layers by hand.

    Mutation: any number of an architecture, a row of flowrl/tuning/targets.py, or a rank or target
    of a model's YAML.
    """
    found = count([f"model={option}"])
    size = found.parameters
    assert size == pytest.approx(SIZES[option], rel=0.02)
    assert size == SIZES[option] or option in ("sana15_1600m", "hunyuan_video")
    assert (len(found.layers), found.lora) == LORA[option]
    assert found.num_bytes == 2 * found.parameters + 5 * 4 * found.lora
    assert found.pretrained in found.describe()


def test_every_option_is_counted():
    """Mutation: add an option without its architecture, or leave a stale one."""
    known = {config(name).model.pretrained for name in options()}
    assert known == ARCHITECTURES.keys() | PUBLISHED.keys()


@pytest.mark.parametrize("option", SIZES)
def test_an_option_is_ready_to_run(option):
    """Over `derived`, on the pipeline's own grid, with steps that a ratio loss may train on.

    Mutation: a step range that ends behind the last step, or a scale without has_guidance.
    """
    cfg = config(option)
    assert cfg.model["_target_"] == "flowrl.models.derived.adapter.Derived"
    assert cfg.schedule["_target_"] == "flowrl.schedule.PipelineGrid"
    check_guidance(cfg)
    method = instantiate(cfg.algorithm)
    check_method(method)
    assert cfg.rollout.trained.high < cfg.rollout.num_steps
    assert cfg.gate_tolerance <= cfg.trust.delta / 2


def test_an_unknown_architecture_is_named():
    """Mutation: a KeyError."""
    with pytest.raises(UserError, match=r"model.pretrained=org/name: no configuration"):
        network_of("org/name")
