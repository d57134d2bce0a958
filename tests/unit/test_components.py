"""Pipelines as people have them: cut, saved with an adapter, in other files. Each is answered
before it is used.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import FAMILIES

from flowrl.models.components import read_json, variant_of
from flowrl.models.loading import Source, resolve
from flowrl.models.sd3 import SD3

EMBEDDED = Path(resolve("embedded:pipeline"))
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT, T5 = "text_encoder/model.safetensors", "text_encoder_3/model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(EMBEDDED, tmp_path / "pipeline"))


def encode(folder, length=16):
    """The embedded model's own loading of everything, T5 included."""
    model = SD3(
        pretrained=str(folder),
        revision=None,
        dtype="float32",
        resolution=32,
        max_sequence_length=length,
        has_guidance=False,
        channels_last=False,
    )
    return model, model.encode_prompts(["a red circle"])


def refusal(folder, length=16):
    with pytest.raises(ValueError, match=r"^(?!.*\n)") as caught:
        encode(folder, length)
    return str(caught.value)


def change(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, {"format": "pt"})


def spoil(weights):
    """One number of the weight that is named last."""
    weights[max(weights)].view(-1)[-1] = torch.nan


@pytest.mark.parametrize(("file", "total"), [(TRANSFORMER, 95), (VAE, 132), (TEXT, 53), (T5, 12)])
def test_missing_weights_are_counted(folder, file, total):
    """The totals are the networks' own. Mutation: ask for weights on meta alone, which transformers
    never leaves.
    """
    gone = sorted(load_file(folder / file))[:3]
    change(folder / file, lambda weights: [weights.pop(name) for name in gone])
    text = refusal(folder)
    assert (
        f"{folder}: {file.split('/')[0]}: 3 of its {total} weights are missing, the first '" in text
    )
    assert any(f"first '{name}'" in text for name in gone)
    assert text.endswith(f"restore {(folder / file).parent} or download it again")


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT, T5])
def test_weights_that_are_no_numbers(folder, file):
    """Mutation: look at a network's first weight alone."""
    change(folder / file, spoil)
    name = max(load_file(folder / file))
    assert f"{file.split('/')[0]}: its weight '{name}' holds NaN or infinity" in refusal(folder)


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT, T5])
def test_weights_of_another_shape(folder, file):
    """Mutation: the library's own four sentences, or its flag that draws them at random."""
    name = min(load_file(folder / file))
    change(folder / file, lambda weights: weights.update({name: torch.zeros(7, 3)}))
    text = refusal(folder)
    assert file.split("/")[0] in text and f"'{name}'" in text and "(7, 3)" in text


@pytest.mark.parametrize("file", [TRANSFORMER, VAE])
def test_weights_without_a_place(folder, file):
    """As where config.json says fewer layers. Mutation: leave them out with the library's
    warning.
    """
    change(folder / file, lambda weights: weights.update({"blocks.99.weight": torch.zeros(3)}))
    text = refusal(folder)
    assert (
        f"{file.split('/')[0]}: weights without a place in the network of its config.json: 1"
        in text
    )
    assert "'blocks.99.weight'" in text


def test_a_text_encoder_may_bring_more(folder, caplog):
    """Released ones carry heads and decoders. Mutation: refuse them, or say nothing."""
    change(folder / T5, lambda weights: weights.update({"lm_head.weight": torch.zeros(3)}))
    _, conditioning = encode(folder)
    assert torch.equal(conditioning.tensors["tokens"], encode(EMBEDDED)[1].tensors["tokens"])
    assert (
        "text_encoder_3: weights without a place" in caplog.text
        and "'lm_head.weight'" in caplog.text
    )


def with_adapter():
    pipe = StableDiffusion3Pipeline.from_pretrained(EMBEDDED)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    return pipe


def test_a_pipeline_saved_with_its_adapter(tmp_path):
    """A query's weight and bias stand under other names, beside two matrices.

    Mutation: the remedy of a cut download, which cannot help here.
    """
    with_adapter().save_pretrained(tmp_path / "saved")
    text = refusal(tmp_path / "saved")
    layers = sum(name.endswith(".to_q.weight") for name in load_file(EMBEDDED / TRANSFORMER))
    assert f"transformer: {2 * layers} of its 95 weights are missing, the first " in text
    assert f"and {4 * layers} of an attached adapter are there instead" in text
    assert "fuse_lora() and then unload_lora_weights()" in text and "lora.start" in text


def test_a_text_encoder_saved_with_its_adapter(folder):
    """Under the names that peft gives. Mutation: look for adapters in the transformer alone."""

    def attach(weights):
        for name in [name for name in weights if name.endswith("q_proj.weight")]:
            stem = name.removesuffix(".weight")
            weights[f"{stem}.base_layer.weight"] = weights.pop(name)
            weights[f"{stem}.lora_A.default.weight"] = torch.zeros(2, 2)

    change(folder / TEXT, attach)
    text = refusal(folder)
    assert (
        "text_encoder: " in text
        and "of an attached adapter are there instead" in text
        and "fuse_lora()" in text
    )


def test_the_remedy_of_an_adapter_helps(tmp_path):
    """What the refusal tells to do gives a pipeline that loads, with the LoRA in its weights.

    Mutation: tell to unload alone, which gives the base.
    """
    pipe = with_adapter()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    fused, base = encode(tmp_path / "fused")[0].transformer, encode(EMBEDDED)[0].transformer
    same = [torch.equal(a, b) for a, b in zip(fused.parameters(), base.parameters(), strict=True)]
    assert same.count(False) == sum(".to_q.weight" in name for name, _ in base.named_parameters())


def test_half_precision_files_are_taken(folder, caplog):
    """Weights that are there under a variant's name alone. Mutation: ask for the plain name."""
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    model, conditioning = encode(folder)
    assert torch.equal(conditioning.tensors["tokens"], encode(EMBEDDED)[1].tensors["tokens"])
    assert model.transformer.dtype == torch.float32
    assert (
        "transformer: only weights of the variant fp16 are there, so they are taken" in caplog.text
    )


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "config.json"], "fp16"),
        (["diffusion_pytorch_model.bf16.safetensors", "diffusion_pytorch_model.bin"], "bf16"),
    ],
)
def test_the_plain_name_comes_first(tmp_path, names, variant):
    """Mutation: take a shard's number for a variant, or a variant where the plain weights are."""
    for name in names:
        (tmp_path / name).touch()
    assert variant_of(tmp_path, "vae") == variant


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["model.fp16.safetensors", "model.ema.safetensors"],
            ["several variants (ema, fp16)", "keep one"],
        ),
        (
            ["pytorch_model.bin"],
            [
                "only pickled weights",
                "pytorch_model.bin",
                "use_safetensors=False",
                "save_pretrained",
            ],
        ),
        (["config.json"], ["no weights in", "download it again"]),
    ],
)
def test_files_that_cannot_be_taken(tmp_path, names, words):
    """Mutation: load a pickle, or choose among variants."""
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"^vae: ") as caught:
        variant_of(tmp_path, "vae")
    assert all(word in str(caught.value) for word in words)


def edit_index(folder, **entries):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_no_t5_where_its_tokens_are_asked_for(folder):
    """Told before any weights load, by the key that helps. Mutation: the pipeline's list of what it
    expected.
    """
    edit_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    (folder / TRANSFORMER).unlink()
    text = refusal(folder)
    assert text.startswith("model.max_sequence_length=16 asks for T5 tokens, but ")
    assert "set model.max_sequence_length=0" in text


def test_without_t5_tokens_none_is_needed(folder):
    """Mutation: refuse every pipeline whose T5 is null."""
    edit_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert torch.equal(
        encode(folder, 0)[1].tensors["tokens"], encode(EMBEDDED, 0)[1].tensors["tokens"]
    )


BROKEN = {
    "tokenizer's folder": (lambda f: shutil.rmtree(f / "tokenizer_2"), ["tokenizer_2: no folder"]),
    "tokenizer's files": (
        lambda f: [
            path.unlink()
            for path in (f / "tokenizer").iterdir()
            if path.name != "tokenizer_config.json"
        ],
        ["tokenizer: no vocabulary in", "vocab.json"],
    ),
    "vae's folder": (lambda f: shutil.rmtree(f / "vae"), ["vae: no folder"]),
    "config.json": (lambda f: (f / "vae/config.json").unlink(), ["vae/config.json is missing"]),
    "index with a mark": (
        lambda f: (f / "model_index.json").write_bytes(
            b"\xef\xbb\xbf" + (f / "model_index.json").read_bytes()
        ),
        ["model_index.json begins with a byte-order mark", "plain UTF-8"],
    ),
    "cut index": (
        lambda f: (f / "model_index.json").write_text((f / "model_index.json").read_text()[:200]),
        ["model_index.json is cut or damaged"],
    ),
    "index of another kind": (
        lambda f: (f / "model_index.json").write_text("[]"),
        ["holds a list and no JSON object"],
    ),
    "unknown class": (
        lambda f: edit_index(f, transformer=["diffusers", "SD3Transformer3DModel"]),
        ["transformer: model_index.json asks for diffusers.SD3Transformer3DModel", "diffusers 0."],
    ),
    "another library": (
        lambda f: edit_index(f, vae=["os", "path"]),
        ["vae: model_index.json asks for os.path"],
    ),
    "null in the index": (
        lambda f: edit_index(f, vae=[None, None]),
        ["its model_index.json has no vae"],
    ),
    "cut configuration": (
        lambda f: (f / "text_encoder/config.json").write_text("{"),
        ["text_encoder/config.json is cut or damaged"],
    ),
    "cut schedule": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text("{"),
        ["scheduler: ", "scheduler_config.json"],
    ),
    "cut weights": (
        lambda f: (f / VAE).write_bytes((f / VAE).read_bytes()[:1000]),
        ["vae: cannot load its AutoencoderKL (corrupt weights file"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_there_is_named(folder, case):
    """Each names the component or file. Mutation: let the library's error, or an empty tokenizer,
    through.
    """
    breaks, words = BROKEN[case]
    breaks(folder)
    text = refusal(folder)
    assert all(word in text for word in words), text


def test_an_index_in_other_bytes(tmp_path):
    """UTF-16, as a text editor may save it. Mutation: catch JSON's errors alone."""
    (tmp_path / "config.json").write_bytes('{"a": 1}'.encode("utf-16"))
    assert read_json(tmp_path / "config.json") == {"a": 1}  # JSON's own readers know it
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"config.json is cut or damaged"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_checked(name, tiny_pipelines, tmp_path):
    """The transformer and the first text encoder of each. Mutation: check one family's alone."""
    family = FAMILIES[name]
    texts = [
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
    ]
    source = Source(family.stock, str(tiny_pipelines[name]), None, "float32")
    whole = source.load()
    assert [
        part for part in ("transformer", "vae", "text_encoder") if getattr(whole, part) is None
    ] == []
    for part in ("transformer", "text_encoder"):
        folder = Path(shutil.copytree(tiny_pipelines[name], tmp_path / part))
        file = next((folder / part).glob("*.safetensors"))
        gone = min(load_file(file))
        change(file, lambda weights, gone=gone: weights.pop(gone))
        left_out = (
            dict.fromkeys(set(texts) & whole.components.keys()) if part == "transformer" else {}
        )
        with pytest.raises(
            ValueError, match=rf"{part}: \d of its \d+ weights are missing, the first '"
        ):
            Source(family.stock, str(folder), None, "float32").load(**left_out)


@pytest.mark.parametrize(
    ("files", "asked"),
    [
        (["vae/diffusion_pytorch_model.safetensors"], [None]),
        (["vae/diffusion_pytorch_model.fp16.safetensors", "model_index.json"], [None, "fp16"]),
    ],
)
def test_a_repository_with_one_variant(folder, monkeypatch, files, asked):
    """The hub is asked for the variant that it has, and only where the plain weights are not there.

    Mutation: load without weights, or always take the variant.
    """
    calls = []

    class Repository(StableDiffusion3Pipeline):
        @classmethod
        def download(cls, name, *, variant=None, **options):
            calls.append(variant)
            if "fp16" in files[0] and variant is None:  # then the hub's own code fetches no weights
                (folder / VAE).rename(folder / "elsewhere")
            if variant == "fp16":
                (folder / "elsewhere").rename(folder / files[0])
            return folder

    class Hub:
        def list_repo_files(self, name, revision):
            return files

    monkeypatch.setattr("flowrl.models.loading.HfApi", Hub)
    monkeypatch.setattr(
        "flowrl.models.loading._fetch_index", lambda *_: str(folder / "model_index.json")
    )
    Repository.__name__ = "StableDiffusion3Pipeline"
    source = Source(Repository, "org/name", None, "float32")
    assert source.load(**dict.fromkeys(["text_encoder_3", "tokenizer_3"])).vae is not None
    assert calls == asked


def test_the_autoencoder_may_decode_in_float32():
    """Beside a transformer in bfloat16, with its weights as they are on disk: the images are those
    of a model in float32.

    Mutation: load it in the dtype of the others, or round it on the way.
    """
    options = {
        "pretrained": str(EMBEDDED),
        "revision": None,
        "resolution": 32,
        "max_sequence_length": 0,
        "has_guidance": False,
        "channels_last": False,
    }
    whole = SD3(dtype="float32", **options)
    mixed = SD3(dtype="bfloat16", decode_dtype="float32", **options)
    plain = SD3(dtype="bfloat16", **options)
    assert mixed.transformer.dtype == plain.vae.dtype == torch.bfloat16
    assert mixed.vae.dtype == torch.float32
    x0 = torch.randn(2, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    images = whole.decode(x0)
    assert torch.equal(mixed.decode(x0), images)
    assert not torch.equal(plain.decode(x0), images)
