"""A pipeline's files as people have them: variants, damaged indices, folders that are not there."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from embedded_pipeline import EMBEDDED, TRANSFORMER, VAE, encode, refusal

from flowrl.models.components import read_json, variant_of
from flowrl.models.loading import Source


def test_half_precision_files_are_taken(embedded_folder, caplog):
    """Weights that are there under a variant's name alone. Mutation: ask for the plain name."""
    for path in embedded_folder.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    model, conditioning = encode(embedded_folder)
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


def test_no_t5_where_its_tokens_are_asked_for(embedded_folder):
    """Told before any weights load, by the key that helps. Mutation: the pipeline's list of what it
    expected.
    """
    edit_index(embedded_folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    (embedded_folder / TRANSFORMER).unlink()
    text = refusal(embedded_folder)
    assert text.startswith("model.max_sequence_length=16 asks for T5 tokens, but ")
    assert "set model.max_sequence_length=0" in text


def test_without_t5_tokens_none_is_needed(embedded_folder):
    """Mutation: refuse every pipeline whose T5 is null."""
    edit_index(embedded_folder, text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(embedded_folder / "text_encoder_3")
    shutil.rmtree(embedded_folder / "tokenizer_3")
    assert torch.equal(
        encode(embedded_folder, 0)[1].tensors["tokens"], encode(EMBEDDED, 0)[1].tensors["tokens"]
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
def test_what_is_there_is_named(embedded_folder, case):
    """Each names the component or file. Mutation: let the library's error, or an empty tokenizer,
    through.
    """
    breaks, words = BROKEN[case]
    breaks(embedded_folder)
    text = refusal(embedded_folder)
    assert all(word in text for word in words), text


def test_an_index_in_other_bytes(tmp_path):
    """UTF-16, as a text editor may save it. Mutation: catch JSON's errors alone."""
    (tmp_path / "config.json").write_bytes('{"a": 1}'.encode("utf-16"))
    assert read_json(tmp_path / "config.json") == {"a": 1}  # JSON's own readers know it
    (tmp_path / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"config.json is cut or damaged"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("files", "asked"),
    [
        (["vae/diffusion_pytorch_model.safetensors"], [None]),
        (["vae/diffusion_pytorch_model.fp16.safetensors", "model_index.json"], [None, "fp16"]),
    ],
)
def test_a_repository_with_one_variant(embedded_folder, monkeypatch, files, asked):
    """The hub is asked for the variant that it has, and only where the plain weights are not there.

    Mutation: load without weights, or always take the variant.
    """
    calls = []

    class Repository(StableDiffusion3Pipeline):
        @classmethod
        def download(cls, name, *, variant=None, **options):
            calls.append(variant)
            if "fp16" in files[0] and variant is None:  # then the hub's own code fetches no weights
                (embedded_folder / VAE).rename(embedded_folder / "elsewhere")
            if variant == "fp16":
                (embedded_folder / "elsewhere").rename(embedded_folder / files[0])
            return embedded_folder

    class Hub:
        def list_repo_files(self, name, revision):
            return files

    monkeypatch.setattr("flowrl.models.loading.HfApi", Hub)
    monkeypatch.setattr(
        "flowrl.models.loading._fetch_index", lambda *_: str(embedded_folder / "model_index.json")
    )
    Repository.__name__ = "StableDiffusion3Pipeline"
    source = Source(Repository, "org/name", None, "float32")
    assert source.load(**dict.fromkeys(["text_encoder_3", "tokenizer_3"])).vae is not None
    assert calls == asked
