"""The embedded pipeline's files, and the model that is loaded from a copy of them."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flowrl.models.loading import resolve
from flowrl.models.sd3 import SD3

EMBEDDED = Path(resolve("embedded:pipeline"))
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT, T5 = "text_encoder/model.safetensors", "text_encoder_3/model.safetensors"


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
