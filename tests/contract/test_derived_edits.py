"""`model=derived` on small random pipelines that edit pictures: the stock pipeline is the
reference, which encodes the very picture.
"""

import diffusers
import pytest
import torch
from families import FAMILIES
from PIL import Image
from toys import ToyPipeline, derive

from flowrl.errors import UserError
from flowrl.models.derived.adapter import Derived
from flowrl.models.derived.arguments import use_of
from flowrl.models.derived.edits import NUM_KEPT, Remembering, blank, drawn_picture
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.training.parity import check
from flowrl.tuning.formats import linear_layers
from flowrl.tuning.lora import LoRA
from flowrl.tuning.targets import ATTENTION
from flowrl.types import PictureFile, Prompt

PROMPTS = ["make it red", "make two blue squares of it"]
SCALES = ("guidance_scale", "true_cfg_scale")
slow = pytest.mark.slow


def derived(folder, family, dtype="float32", **changed):
    call = {name: value for name, value in family.call.items() if name not in SCALES} | changed
    call = {name: value for name, value in call.items() if value is not None}
    options = {"revision": None, "without": [], "guidance": None, "channels_last": False}
    return Derived(pretrained=str(folder), dtype=dtype, call=call, has_guidance=True, **options)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    place = tmp_path_factory.mktemp("families")

    def save(name):
        folder = place / name
        return folder if folder.is_dir() else FAMILIES[name].save(folder)

    return save


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("flux1_kontext", "float32"),
        pytest.param("qwen_image_edit_plus", "float32", marks=slow),
        pytest.param("flux2_klein", "float32", marks=slow),
        pytest.param("wan22_i2v", "float32", marks=slow),
        pytest.param("flux1_kontext", "bfloat16", marks=slow),
        pytest.param("qwen_image_edit_plus", "bfloat16", marks=slow),
    ],
)
def test_an_edit_is_its_stock_pipelines(name, dtype, folder_of):
    """Bitwise in float32, of pictures of two sizes, guided and not; the stock pipeline encodes the
    picture anew. Image latents and their positions are tensors by name, with rows.

    Mutations: a blank picture for the prompt's, its latents left out of a row, one row's for all.
    """
    model = derived(folder_of(name), FAMILIES[name], dtype)
    # Of attentions alone, whose idle layers are listed; published recipes adapt others beside them.
    layers = linear_layers(model.transformer)
    targets = [name for name in layers if ATTENTION.fullmatch(name)]
    tuning = LoRA(rank=4, alpha=8, targets=targets, init="gaussian").attach(model.transformer, 0)
    pictures = [drawn_picture(1), drawn_picture(2).transpose(Image.Transpose.ROTATE_90)]
    rows = model.encode_edits(PROMPTS, pictures)
    assert any(key.startswith("prepare_") for key in rows.tensors) and len(rows) == 2
    model.drop_text_encoders()
    options = {"num_steps": 3, "seed": 0, "picture": pictures[0]}
    for measured in check(model, rows, tuning.parameters(), scales=[1.0, 3.0], **options):
        print(f"{name}, {dtype}: {measured.describe()}")
        if dtype == "float32":
            assert (measured.velocity, measured.rollout, measured.image) == (0, 0, 0)
        num_idle = len(FAMILIES[name].idle)
        assert measured.has_gradient >= len(tuning.parameters()) // 2 - num_idle


def test_the_picture_decides_and_rows_go_where_they_belong(folder_of, tmp_path):
    """Rows of two sizes in one batch, from the disk, without encoders or pictures.

    Mutations: group rows by their number, or replay the first row's image latents.
    """
    family = FAMILIES["flux1_kontext"]
    folder = folder_of("flux1_kontext")
    files = []
    for number, turn in enumerate((None, Image.Transpose.ROTATE_90, None)):
        picture = drawn_picture(number)
        path = tmp_path / f"{number}.png"
        (picture if turn is None else picture.transpose(turn)).save(path)
        files.append(PictureFile(str(path), str(number)))
    prompts = [Prompt(PROMPTS[0], image=file) for file in files]
    first = derived(folder, family)
    embed = PromptEmbeddings(first, prompts, folder=str(tmp_path), chunk=1)
    recorded = embed(prompts)
    for file in files:
        (tmp_path / f"{file.digest}.png").unlink()
    model = derived(folder, family)
    model.text.drop()
    model.text._load = None  # whoever loads encoders now fails
    rows = PromptEmbeddings(model, prompts, folder=str(tmp_path), chunk=1)(prompts)
    assert all(torch.equal(rows.tensors[key], recorded.tensors[key]) for key in recorded.tensors)
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = [model.velocity(x, 0.5, rows[i : i + 1], 3.0) for i in range(3)]
        together = model.velocity(x.expand(4, -1, -1), 0.5, rows[torch.tensor([1, 0, 1, 2])], 3.0)
    torch.testing.assert_close(together, torch.cat([alone[i] for i in (1, 0, 1, 2)]))
    assert (alone[0] - alone[2]).abs().max() > 1e-3


def test_a_state_that_follows_the_picture_is_refused(folder_of):
    """Mutation: record whatever state there is."""
    family = FAMILIES["flux2_klein"]
    model = derived(folder_of("flux2_klein"), family, height=None, width=None)
    with pytest.raises(UserError, match="set height and width in model"):
        model.encode_edits(PROMPTS[:1], [drawn_picture()])


def test_a_clip_whose_first_frame_is_kept_from_the_steps_is_refused(folder_of):
    """It takes a picture always, though its signature has a default for it, and is told by the
    shape of its steps. Mutation: hand the state of a step to the network.
    """
    model = derived(folder_of("ltx_i2v"), FAMILIES["ltx_i2v"])
    assert use_of(model.kind) == "sometimes" and model.use == "always"
    pictures = [drawn_picture(1), drawn_picture(2)]
    rows = model.encode_edits(PROMPTS, pictures)
    with pytest.raises(UserError, match=r"its state is \(1, 96, 8\), but its scheduler steps"):
        check(model, rows, {}, scales=[1.0], num_steps=2, seed=0, picture=pictures[0])


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("FluxKontextPipeline", "sometimes"),
        ("Flux2Pipeline", "sometimes"),
        ("QwenImageEditPlusPipeline", "always"),
        ("WanImageToVideoPipeline", "always"),
        ("QwenImagePipeline", "never"),
        ("StableDiffusion3Pipeline", "never"),
    ],
)
def test_signatures_tell_who_takes_a_picture(name, use):
    """Mutation: go by the call's defaults alone."""
    assert use_of(getattr(diffusers, name)) == use


def test_a_picture_comes_with_a_prompt_and_not_with_the_call(folder_of):
    """Mutation: let the call's picture stand beside every prompt."""
    with pytest.raises(UserError, match=r"model.call.image=a.png cannot be given: pictures come"):
        derived(folder_of("flux1_kontext"), FAMILIES["flux1_kontext"], image="a.png")


class OneAtATime(ToyPipeline):
    """A toy that takes one prompt a call, to whose text it adds its picture's first colours."""

    def encode_prompt(self, prompt, image=None, device=None):
        return self.text_encoder(prompt)

    def prepare_latents(self, image, count, generator, latents=None):
        x = super().prepare_latents(count, generator, latents)
        return x, torch.tensor([image.getpixel((0, 0))[:2]]) / 255

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        prompt=None,
        negative_prompt=None,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=None,
        latents=None,
        output_type="pt",
        return_dict=True,
    ):
        if len(prompt) > 1:
            raise ValueError("one prompt at a time")
        text = self.encode_prompt(prompt, image)
        negative = self.encode_prompt(negative_prompt, image) if guidance_scale > 1 else None
        x, source = self.prepare_latents(image, len(prompt), generator, latents)
        text = text + source
        negative = None if negative is None else negative + source
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.step(self.predict(x, t, text, negative, guidance_scale), t, x)
        image = self.vae.decode(x)[0]
        channels = torch.cat([image, image[:, :1]], 1)
        return (channels[:, :, None, None].expand(-1, -1, 2, 4).clamp(0, 1),)


def test_a_pipeline_that_takes_one_picture_a_call_is_called_once_a_row(monkeypatch, caplog):
    """W x + (1 + sigma) (source + scale text), by hand, for both rows, and both decoded.

    No call with both is tried. Mutations: call it with all rows, or give all the first row's
    picture.
    """
    model = derive(monkeypatch, OneAtATime)
    assert model.use == "always"
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ((255, 51, 0), (51, 0, 0))]
    rows = model.encode_edits(["a red cube", "two"], pictures)
    x = torch.tensor([[1.0, 2.0], [-4.0, 8.0]])
    velocity = model.velocity(x, 0.25, rows, 3.0)
    text = torch.tensor([[10.0, 2.0], [3.0, 0.0]]) / 8
    source = torch.tensor([[1.0, 0.2], [0.2, 0.0]])
    moved = torch.tensor([[0.5 - 0.5, 0.125 + 1.5], [-2.0 - 2.0, -0.5 + 6.0]])
    expected = moved + 1.25 * (source + 3 * text)
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-6)
    assert not caplog.records
    assert model.decode(torch.tensor([[1.0, 0.5], [3.0, -1.0]]))[:, :, 0, 0].tolist() == [
        [0.5, 0.25, 0.5],
        [1.0, 0.0, 1.0],
    ]


class Processor:
    """Counts the pictures that it prepares."""

    def __init__(self):
        self.asked = []

    def preprocess(self, image, height, width=1):
        self.asked.append(image.size)
        return image.resize((width, height))

    def resize(self, image, height, width):
        return self.preprocess(image, height, width)

    def postprocess(self, image):
        return image


def test_blank_pictures_are_prepared_once_a_size():
    """A picture of a prompt's is prepared at every call, a blank one's result is blank too, and the
    oldest result goes where there are many. Mutations: forget the arguments in the key, or the
    mark.
    """
    processor = Processor()
    remembering = Remembering(processor)
    picture = drawn_picture()
    for _ in range(2):
        remembering.preprocess(picture, 4)
        small = remembering.resize(blank((8, 6)), 3, width=4)
        assert small.size == (4, 3)
        assert remembering.preprocess(small, 2).size == (1, 2)
    assert processor.asked == [(96, 64), (8, 6), (4, 3), (96, 64)]
    assert remembering.preprocess(blank((8, 6)), 5).size == (1, 5)
    assert remembering.postprocess(7) == 7
    for side in range(NUM_KEPT):
        remembering.preprocess(blank((8, 6)), 10 + side)
    count = len(processor.asked)
    remembering.resize(blank((8, 6)), 3, width=4)
    assert len(processor.asked) == count + 1
