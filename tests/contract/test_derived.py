"""`model=derived` on small random pipelines of the real classes: the stock pipeline is the
reference, and no family is named in the adapter.
"""

import gc
import shutil
import weakref

import pytest
import torch
from families import FAMILIES

from flowrl.errors import UserError
from flowrl.models.conditioning import repeated
from flowrl.models.derived.adapter import Derived
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.sd3 import SD3
from flowrl.training.parity import check
from flowrl.tuning import formats
from flowrl.tuning.layer_names import NAMES
from flowrl.tuning.lora import LoRA
from flowrl.tuning.networks import companions_of
from flowrl.tuning.targets import ATTENTION
from flowrl.types import Conditioning, Prompt

PROMPTS = ["a red circle", "two blue squares and a green triangle"]
SCALES = ("guidance_scale", "true_cfg_scale")
FEW = ("sd3", "z_image", "wan21")
"""A latent of each rank; texts of a length each; and two calls of the network a velocity."""
UNTRAINED = ("prx", "kandinsky5")
"""Refused, each in a test of its own: no LoRA, sums over rows."""
GUIDED_AT_ONE = ("krea2", "hunyuan_image")
"""Guided though the scale is 1: by scale + 1, and by a guider of its own."""
PICTURELESS = [
    name
    for name, family in FAMILIES.items()
    if family.picture is None and family.obstacle is None and name not in UNTRAINED
]
some = pytest.mark.parametrize(
    "name",
    [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PICTURELESS],
)


def derived(folder, family, dtype="float32", **options):
    """The model, with guidance where the call takes its scale as a number."""
    call = {name: value for name, value in family.call.items() if name not in SCALES}
    call.pop("output_type", None)
    settings = {"revision": None, "without": [], "guidance": None, "channels_last": False}
    settings |= {"pretrained": str(folder), "dtype": dtype, "call": call} | options
    try:
        return Derived(has_guidance=True, **settings)
    except UserError as error:
        if "takes no guidance scale" not in str(error):
            raise
    return Derived(has_guidance=False, **settings)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    place = tmp_path_factory.mktemp("families")

    def save(name):
        folder = place / name
        return folder if folder.is_dir() else FAMILIES[name].save(folder)

    return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@some
def test_a_family_does_as_its_stock_pipeline(name, dtype, folder_of):
    """Bitwise in float32: velocities, last state and picture, guided and not; in bfloat16 the
    velocities without guidance, at the stock pipeline's own states. Rows alone and beside others.

    Mutations: sigma for the timestep, a pair of another step, the probe's text for a row's, no
    copy of the state, guidance in the networks' own dtype, a clip taken for a picture.
    """
    model = derived(folder_of(name), FAMILIES[name], dtype)
    # Of attentions alone, whose idle layers are listed; published recipes adapt others beside them.
    layers = formats.linear_layers(model.transformer)
    targets = [name for name in layers if ATTENTION.fullmatch(name)]
    tuning = LoRA(rank=4, alpha=8, targets=targets, init="gaussian").attach(model.transformer, 0)
    trained = tuning.parameters()
    scales = [1.0, 3.0] if model.arguments.has_guidance else [1.0]
    rows = model.encode_prompts(PROMPTS)
    model.drop_text_encoders()
    for measured in check(model, rows, trained, scales=scales, num_steps=4, seed=0):
        print(f"{name}, {dtype}: {measured.describe()}")
        assert measured.num_frames == FAMILIES[name].call.get("num_frames")
        if dtype == "float32":
            assert (measured.velocity, measured.rollout, measured.image) == (0, 0, 0)
        elif measured.guidance_scale == 1 and name not in GUIDED_AT_ONE:
            assert measured.velocity == 0
        # Every B has a gradient but that of a layer whose output the pipeline drops; A has none
        # while B is zero.
        num_idle = len(FAMILIES[name].idle)
        assert measured.has_gradient >= len(trained) // 2 - num_idle


@some
def test_an_export_gives_the_stock_pipeline_the_same_weights(name, folder_of, tmp_path):
    """By the pipeline's loader, or its transformer's. Mutation: leave the alpha out of the file."""
    model = derived(folder_of(name), FAMILIES[name])
    tuning = LoRA(rank=4, alpha=8, targets="auto", init="gaussian").attach(model.transformer, 0)
    with torch.no_grad():
        for parameter in tuning.parameters().values():
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    rows = model.encode_prompts(PROMPTS)
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(2))
    sigma = model.grid(4)[1]
    with torch.no_grad():
        expected = model.velocity(x, sigma, rows, 1.0)
    tuning.save(model.pipeline, tmp_path)
    assert len(formats.read(tmp_path).a) == len(tuning.parameters()) // 2
    other = derived(folder_of(name), FAMILIES[name])
    with torch.no_grad():
        other.grid(4)  # whose timesteps are taken from now on
        base = other.velocity(x, sigma, rows, 1.0)
        if hasattr(other.pipeline, "load_lora_weights"):
            other.pipeline.load_lora_weights(tmp_path)
            for network, file in companions_of(tmp_path / NAMES["diffusers"]).items():
                choice = {"weight_name": file.name, f"load_into_{network}": True}
                other.pipeline.load_lora_weights(tmp_path, **choice)
        else:
            other.transformer.load_lora_adapter(tmp_path, weight_name=NAMES["diffusers"])
        loaded = other.velocity(x, sigma, rows, 1.0)
    assert (loaded - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (base - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(("name", "limit"), [("sd3", 77), ("wan21", 64)])
def test_what_is_cut_of_a_prompt_is_told(name, limit, folder_of):
    """In words, of the first tokenizer that cuts; each character is a token, and one closes the
    text. Mutations: note no call, take the probe's text for the prompt's, or no limit.
    """
    model = derived(folder_of(name), FAMILIES[name])
    assert model.truncated_part("a red circle") == ""
    told = model.truncated_part("a red circle " + 8 * "and a green one ")
    assert told.endswith(f"beyond the {limit} tokens of the model's tokenizer")
    letters = "".join(filter(str.isalpha, told))
    assert "green" in letters and "red" not in letters


def test_texts_of_different_lengths_go_through_calls_of_their_own(folder_of):
    """In the rows' own order. Mutations: leave the rows as their calls give them, or give all the
    first one's text.
    """
    model = derived(folder_of("z_image"), FAMILIES["z_image"])
    rows = model.encode_prompts(PROMPTS)
    numbers = torch.tensor([1, 0, 1, 0])
    x = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model.velocity(x, 0.5, rows[numbers], 3.0)
        for i, number in enumerate(numbers):
            alone = model.velocity(x[i : i + 1], 0.5, rows[number : number + 1], 3.0)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_embeddings_of_the_disk_are_those_recorded(folder_of, tmp_path):
    """Names and values, and no text encoder is asked again. Mutation: round them on the way."""
    model = derived(folder_of("z_image"), FAMILIES["z_image"])
    prompts = [Prompt(text) for text in PROMPTS]
    first = PromptEmbeddings(model, prompts, folder=str(tmp_path), chunk=2)(prompts)
    again = derived(folder_of("z_image"), FAMILIES["z_image"])
    again.text.drop()
    again.text._load = None  # whoever loads encoders now fails
    second = PromptEmbeddings(again, prompts, folder=str(tmp_path), chunk=2)(prompts)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


def test_text_encoders_are_freed_without_the_collectors_help(folder_of):
    """Mutation: leave the recorder on the pipeline that has them."""
    model = derived(folder_of("sd3"), FAMILIES["sd3"])
    encoder = weakref.ref(model.text.pipeline().text_encoder)
    gc.disable()
    try:
        PromptEmbeddings(model, [Prompt(text) for text in PROMPTS], folder=None, chunk=4)
        assert encoder() is None
    finally:
        gc.enable()


def test_a_graph_is_freed_with_its_velocity(folder_of):
    """Left by an exception, a pipeline's frames must not keep it. Mutation: keep the exception."""
    model = derived(folder_of("sd3"), FAMILIES["sd3"])
    rows = model.encode_prompts(PROMPTS)
    x = torch.randn(2, *model.latent_shape).requires_grad_()
    gc.disable()
    try:
        velocity = model.velocity(x, 0.5, rows, 3.0)
        graph = weakref.ref(velocity)
        del velocity
        assert graph() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_the_embedded_model_is_its_hand_written_adapters(scale):
    """Bitwise, guided and not, decoded too. Mutation: combine the guidance the other way round."""
    options = {"pretrained": "embedded:pipeline", "revision": None, "dtype": "float32"}
    options |= {"has_guidance": True, "channels_last": True}
    own = SD3(resolution=32, max_sequence_length=0, **options)
    model = Derived(
        without=["text_encoder_3", "tokenizer_3"],
        call={"height": 32, "width": 32, "max_sequence_length": 0},
        guidance=None,
        **options,
    )
    assert model.latent_shape == own.latent_shape
    x = torch.randn(1, *own.latent_shape, generator=torch.Generator().manual_seed(0))
    prompt = "two red circles"
    rows = own.encode_prompts([prompt])
    rows = Conditioning(rows.tensors, repeated(own.encode_prompts([""]), 1))
    with torch.no_grad():
        expected = own.velocity(x, 0.73, rows, scale)
        velocity = model.velocity(x, 0.73, model.encode_prompts([prompt]), scale)
    assert torch.equal(velocity, expected)
    assert torch.equal(model.decode(x), own.decode(x))


def test_a_transformer_without_adapters_asks_for_full_tuning(folder_of):
    """Mutation: let diffusers fail at the first layer."""
    model = derived(folder_of("prx"), FAMILIES["prx"])
    recipe = LoRA(rank=4, alpha=8, targets="auto", init="gaussian")
    with pytest.raises(UserError, match=r"no LoRA to a PRXTransformer2DModel; set tuning=full"):
        recipe.check_layers(model.transformer)


REASONS = {
    "ltx2": "it copies its scheduler, so it steps two states at once",
    "edm": "it has no transformer",
    "kandinsky5": "no axis is the rows', as of a running sum over rows",
    "hunyuan_image_memory": "which its guidance remembers, differs from its own",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if "memory" in name else name for name in REASONS],
)
def test_families_that_cannot_be_trained_say_why(name, folder_of):
    """Mutation: let the scheduler be copied, or ask the check nothing after the first state."""
    with pytest.raises(UserError) as error:
        model = derived(folder_of(name), FAMILIES[name])
        rows = model.encode_prompts(PROMPTS)
        check(model, rows, {}, scales=[1.0], num_steps=4, seed=0)
    assert REASONS[name] in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_no_pipeline_of_diffusers_is_named(folder_of, tmp_path):
    """Mutation: look for the class among its own files."""
    folder = tmp_path / "copy"
    shutil.copytree(folder_of("sd3"), folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "MyPipeline"))
    with pytest.raises(UserError, match="holds a MyPipeline, which diffusers"):
        derived(folder, FAMILIES["sd3"])
