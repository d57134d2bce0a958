"""Plans of a distilling run: the teachers' LoRAs and their pass, on a small random SD3.5."""

import pytest
from lora_weights import given
from test_memory_plan import TWELVE, planned
from tiny import FAMILIES

from flowrl.cli import plan as plan_memory
from flowrl.cli.plan_teachers import dearest
from flowrl.errors import UserError
from flowrl.models import meta_memory
from flowrl.tuning.writer import write

DISTILLED = (*TWELVE, "sampler=flow_sde", "loss=opd")
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q")
"""Of 32 x 32 weights."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LoRAs of rank 4 on both layers and of rank 2 on one."""
    place = tmp_path_factory.mktemp("teachers")
    return {
        "large": write(given(LAYERS, rank=4), place / "large", "comfy"),
        "small": write(given(LAYERS[:1], rank=2), place / "small", "comfy"),
    }


def of(files, **more):
    """Two teachers with files, and whatever is said of others."""
    small = f"small: {{lora: {files['small']}, families: [a], guidance_scale: 4.5}}"
    large = f"large: {{lora: {files['large']}, guidance_scale: 1.0}}"
    return f"teachers={{{', '.join([small, large, *more.values()])}}}"


def test_the_loras_of_teachers_lie_beside_the_weights(files, tiny_pipelines):
    """Matrices of 4 x 32 and 2 x 32 numbers of 4 bytes, two a layer; on the host while a run loads,
    too. Nothing else that is there all along changes.

    Mutation: leave one teacher out, or count a teacher as what is trained.
    """
    alone = planned(tiny_pipelines, *DISTILLED)
    taught = planned(tiny_pipelines, *DISTILLED, of(files))
    num_bytes = 4 * (2 * 2 * 4 * 32 + 2 * 2 * 32)
    assert alone.weights()["teachers"] == 0
    assert taught.weights() == alone.weights() | {"teachers": num_bytes}
    assert taught.loading() == alone.loading() + num_bytes
    # With guidance the pass takes both prompts, so that one is the dearest, though it is small.
    assert dearest(taught.teachers) is taught.teachers["small"]


def test_the_pass_of_teachers_is_one_of_the_network(tiny_pipelines, files):
    """A teacher without a LoRA yet is taken to be the one that is trained: as many bytes, and in
    each of two terms one pass more, such as each of a rollout's four steps makes. A teacher's own
    LoRA, of 2 ranks in one layer of 16 image tokens, stands in place of the trained one.

    Mutation: a pass for each teacher, none, or one with the trained LoRA beside the teacher's.
    """
    alone = planned(tiny_pipelines, *DISTILLED)
    open_ones = "teachers={a: {lora: ???, families: [a]}, b: {lora: ???, families: [b]}}"
    taught = planned(tiny_pipelines, *DISTILLED, open_ones)
    assert taught.weights()["teachers"] == 2 * alone.whole
    before, after = alone.work(False), taught.work(False)
    assert after.update - before.update == 2 * before.rollout / 4
    small = f"teachers={{a: {{lora: {files['small']}}}}}"
    own = planned(tiny_pipelines, *DISTILLED, small)
    with own.tuning.at_base():
        base = meta_memory.flops_of(
            lambda: own.look(own.noise(1), own.conditioning(1), own.method.guidance_scale, 0)
        )
    rows = base_rows(own)
    lora = 2 * rows * 16 * (32 * 2 + 2 * 32)
    assert own.work(False).update - before.update == 2 * (base + lora)


def base_rows(plan):
    """The rows that a sample passes through the network: two with guidance."""
    return 2 if plan.method.guidance_scale != 1 else 1


def test_a_teacher_without_a_lora_is_told(files, tiny_pipelines, call):
    """The recipe leaves its teachers open, and can be planned as it stands; without a LoRA that is
    trained there is none to compare with. Mutation: refuse the one, or take the other for nothing.
    """
    words = FAMILIES["sd3"].overrides(tiny_pipelines["sd3"])
    recipe = ("experiment=diffusion_opd_sd35", *words, *TWELVE)
    status, out, err = call(plan_memory, *recipe, f"teachers.ocr.lora={files['small']}")
    assert status == 0, err
    told = "  taken to be as large as the LoRA that is trained: teachers pickscore, geneval\n"
    assert told in out and "  teachers  " in out
    with pytest.raises(UserError, match=r"teachers\.a\.lora has no value yet, and no LoRA is"):
        planned(tiny_pipelines, *DISTILLED, "tuning=full", "teachers={a: {lora: ???}}")
