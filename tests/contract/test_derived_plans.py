"""Models over `derived` without their weights: the conditioning, operations and bytes of a plan are
those of the small random pipelines with their weights and their text encoders.
"""

import json
from functools import cache

import pytest
import torch
from count_parameters import count
from families import FAMILIES
from hydra.errors import InstantiationException
from layer_products import products
from runs import composed
from test_derived import derived
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowrl.cli.memory_plan import Plan
from flowrl.errors import UserError
from flowrl.models import meta_memory
from flowrl.models.conditioning import repeated
from flowrl.models.derived.trees import LAYOUT
from flowrl.models.loading import META
from flowrl.types import Conditioning

LENGTH = 8
"""Tokens that every text is cut to, so that it is as long as it may be."""
PLANNED = ("qwen_image", "z_image", "sana", "wan21", "wan22", "hunyuan_video", "ltx_video")
FEW = ("qwen_image", "z_image", "sana")
NAMES = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PLANNED]
some = pytest.mark.parametrize("name", NAMES)
SIGMA = 0.5


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """A family's small pipeline with its weights, and as a plan has it."""
    place = tmp_path_factory.mktemp("planned")

    @cache
    def make(name):
        family = FAMILIES[name]
        folder = family.save(place / name)
        cut = family.call | {"max_sequence_length": LENGTH}
        options = {"call": {key: cut[key] for key in cut if not key.endswith("_scale")}}
        return [derived(start + str(folder), family, **options) for start in ("", META)]

    return make


@some
def test_a_plan_has_the_texts_of_the_pipeline(name, pair_of):
    """Names, shapes, dtypes, and how they are put together. Mutation: forget a mask or the negative
    prompt, a mask of another dtype, or other axes.
    """
    model, planned = pair_of(name)
    rows = model.encode_prompts(["three red circles and a green triangle on a table"])
    shapes = {key: tuple(value.shape[1:]) for key, value in rows.tensors.items()}
    dtypes = {key: value.dtype for key, value in rows.tensors.items()}
    assert planned.conditioning_shapes == shapes
    assert planned.conditioning_dtypes == dtypes
    assert planned.latent_shape == model.latent_shape
    assert planned.kind is model.kind
    layouts = [
        json.loads(bytes(tensor.tolist()))
        for tensor in (rows.tensors[LAYOUT][0], planned._row(*texts_of(planned))[LAYOUT])
    ]
    assert layouts[0] == layouts[1]


def texts_of(model):
    return model._probe.texts, model._probe.text_layout


def blank(model, rows):
    """States and texts of so many rows on the meta device."""
    tensors = {
        name: torch.empty(rows, *shape, dtype=model.conditioning_dtypes[name], device="meta")
        for name, shape in model.conditioning_shapes.items()
    }
    return torch.empty(rows, *model.latent_shape, device="meta"), Conditioning(tensors)


@some
def test_a_plans_passes_are_those_of_the_pipeline(name, pair_of):
    """Operations of a velocity of two rows and of decoding, guided and not, equal; the most bytes
    of a backward pass within 2 percent, since numbers on the CPU cost some of their own.

    Mutation: a call a row, a pass of guidance too many or too few, or another size.
    """
    model, planned = pair_of(name)
    rows = repeated(model.encode_prompts(["a red circle"]), 2)
    x = torch.randn(2, *model.latent_shape)
    y, blanks = blank(planned, 2)
    model.transformer.requires_grad_(True)
    planned.transformer.requires_grad_(True)
    for scale in (1.0, 3.0) if model.arguments.has_guidance else (1.0,):
        with sdpa_kernel(SDPBackend.MATH):  # the operations of a CPU's own kernel are not counted
            flops = meta_memory.flops_of(lambda s=scale: model.velocity(x, SIGMA, rows, s))
        assert meta_memory.flops_of(lambda s=scale: planned.velocity(y, SIGMA, blanks, s)) == flops
        assert flops > 0

        def update(which, state, given, s=scale):
            which.velocity(state, SIGMA, given, s).square().mean().backward()

        real = meta_memory.peak_of(lambda: update(model, x, rows))
        assert meta_memory.peak_of(lambda: update(planned, y, blanks)) == pytest.approx(real, 0.02)
    with sdpa_kernel(SDPBackend.MATH):
        decoded = meta_memory.flops_of(lambda: model.decode(x))
    assert meta_memory.flops_of(lambda: planned.decode(y)) == decoded > 0


@pytest.mark.slow
@pytest.mark.parametrize("option", ["sana15_1600m", "z_image", "qwen_image"])
def test_a_released_size_is_planned(option):
    """Weights, LoRA and its copies as counted; operations of a velocity by hand, layer by layer.

    Mutation: another dtype or layer, a copy less, a network of another size.
    """
    cfg = composed(f"model={option}", "batch.prompts_per_iteration=1", "batch.group_size=2")
    plan = Plan(cfg)
    counted = count([f"model={option}"])
    weights = plan.weights()
    assert weights["frozen weights"] == 2 * counted.parameters
    names = ("trained weights", "their gradients", "EMA")
    assert [weights[name] for name in names] == [4 * counted.lora] * 3
    assert weights["optimizer"] == 8 * counted.lora
    network = plan.model.transformer
    arguments = (plan.noise(1), plan.conditioning(1), plan.method.guidance_scale, 0)
    by_hand = products(network.modules(), lambda: plan.look(*arguments))
    # SANA's attention of pixels is linear, of products that no layer makes.
    assert plan.operations[0] == pytest.approx(by_hand, rel=0.03)
    assert plan.text_encoders() > 2e9


def test_a_plan_holds_a_derived_prompt_in_its_own_dtypes(pair_of):
    """SANA's 8 tokens of 32 features and their mask of 8 bytes each, for the prompt and the
    negative one, and the layout's bytes.

    Mutation: count all in the transformer's dtype.
    """
    _, planned = pair_of("sana")
    folder = planned.pretrained.removeprefix(META)
    call = "{height: 32, width: 64, use_resolution_binning: false, max_sequence_length: 8}"
    words = [f"model.pretrained={folder}", "model.dtype=float32", f"model.call={call}"]
    plan = Plan(composed("model=derived", *words, "lora.rank=4"))
    (length,) = planned.conditioning_shapes[LAYOUT]
    assert plan.prompt(plan.conditioning(3)) == 2 * (8 * 32 * 4 + 8 * 8) + length
    assert plan.picture == (1, 32, 64) and plan.pixels == 32 * 64


def refused(option, *overrides):
    with pytest.raises(InstantiationException) as failure:
        Plan(composed(f"model={option}", *overrides))
    refusal = failure.value.__cause__
    assert isinstance(refusal, UserError) and "\n" not in str(refusal)
    return str(refusal)


def test_what_cannot_be_planned_says_what_is_missing(tmp_path):
    """Mutation: count an edit without its picture, or end in a traceback."""
    words = refused("qwen_image_edit_plus")
    assert "a QwenImageEditPlusPipeline takes pictures with prompts, whose tokens plans" in words
    assert "unknown architecture" in refused("derived", "model.pretrained=org/name")
    folder = FAMILIES["lumina2"].save(tmp_path / "lumina2")
    words = refused("derived", f"model.pretrained={folder}")
    assert "plans do not know what a Lumina2Pipeline encodes prompts to, but of QwenImage" in words


def test_a_call_that_reads_numbers_is_refused(pair_of):
    """Z-Image compares norms where `cfg_normalization` is on. Mutation: let the error out."""
    _, planned = pair_of("z_image")
    options = {"cfg_normalization": True, "height": 32, "width": 48}
    other = derived(planned.pretrained, FAMILIES["z_image"], call=options)
    with pytest.raises(UserError, match="a ZImagePipeline called so cannot be planned"):
        other.velocity(*blank(other, 1)[:1], 0.5, blank(other, 1)[1], 3.0)
