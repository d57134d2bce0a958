"""The networks of the embedded shapes pipeline: their sizes, how captions condition them, scoring,
export.
"""

from __future__ import annotations

import json
import random
import string
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from flowrl.runs.files import grant_usual_mode
from flowrl.shapes.grammar import FAMILIES, WORDS, Caption, sample_caption
from flowrl.shapes.render import lay_out, render
from flowrl.shapes.verify import Verdict, verify

Network = Any
"""A network of diffusers, whose methods type checkers do not see."""

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 24, 48),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
TEXT_WIDTH = 64
NUM_TOKENS = 10
TEXT_ENCODER = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "projection_dim": TEXT_WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": NUM_TOKENS,
}
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 2 * TEXT_WIDTH,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 2 * TEXT_WIDTH,
    "pos_embed_max_size": 8,
}
SHIFT = 2.0


def draw_scenes(count: int, rng: random.Random) -> tuple[list[Caption], Tensor]:
    """Draw captions of all families in equal shares and their images, float32 in [-1, 1], shape
    (count, 3, H, W).
    """
    # All captions before any layout: the order of the draws decides the scenes of a seed.
    captions = [sample_caption(rng.choice(FAMILIES), rng) for _ in range(count)]
    layouts = [lay_out(caption, rng) for caption in captions]
    images = torch.from_numpy(render(layouts))
    return captions, images.permute(0, 3, 1, 2) * 2 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Turn images in [-1, 1], (B, 3, H, W), into the verifier's: (B, H, W, 3) in [0, 1]."""
    scaled = images.float().clamp(-1, 1) / 2 + 0.5
    return scaled.permute(0, 2, 3, 1).numpy()


def make_tokenizer() -> CLIPTokenizer:
    """Make a CLIP tokenizer in which every word of the grammar is one token and other words fall
    back to letters.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list(string.ascii_lowercase)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*WORDS, *letters], trainer)
    # The library gives out its merges only in the text that it saves.
    learned = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    # The trainer numbers the alphabet in an order that changes from process to process: number
    # everything here.
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{letter}</w>" for letter in letters),
    ]
    tokens += [first + second for first, second in merges]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        model_max_length=NUM_TOKENS,
    )


class Generator(nn.Module):
    """The networks that stage 2 trains, a transformer and two text encoders, which a caption
    conditions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        options: dict[str, Any] = TEXT_ENCODER | special | {"vocab_size": len(self.tokenizer)}
        config = CLIPTextConfig(**options)
        self.text_encoder = CLIPTextModelWithProjection(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(config)
        self.transformer: Network = SD3Transformer2DModel(**TRANSFORMER)
        self._ids: dict[str, Tensor] = {}

    def token_ids(self, texts: list[str]) -> Tensor:
        """Return the tokens of texts, (B, NUM_TOKENS); each text is only read once."""
        for text in set(texts) - self._ids.keys():
            encoding = self.tokenizer(
                text, padding="max_length", max_length=NUM_TOKENS, truncation=True
            )
            self._ids[text] = torch.tensor(encoding.input_ids)
        return torch.stack([self._ids[text] for text in texts])

    def encode(self, texts: list[str], num_pads: int = 0) -> tuple[Tensor, Tensor]:
        """Return token embeddings (B, NUM_TOKENS + num_pads, D) and pooled ones (B, D), as
        StableDiffusion3Pipeline does.

        `num_pads` zero tokens stand where T5's would: the stock pipeline appends
        `max_sequence_length` of them.
        """
        ids = self.token_ids(texts)
        encoders = (self.text_encoder, self.text_encoder_2)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        # The last layer but one, as the stock pipeline takes it.
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        pads = tokens.new_zeros(len(texts), num_pads, tokens.shape[-1])
        return torch.cat([tokens, pads], dim=1), pooled

    def velocity(self, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """Evaluate the transformer at latents x (B, C, H, W) and noise levels sigma (B,)."""
        # diffusers' transformers take timesteps from 0 to 1000.
        return self.transformer(x, tokens, pooled, sigma * 1000, return_dict=False)[0]


@torch.no_grad()
def reconstruction_score(autoencoder: Network, count: int) -> float:
    """Return the verifier's mean strict score of reconstructions of `count` unseen scenes."""
    captions, images = draw_scenes(count, random.Random("reconstruction"))
    decoded = []
    # In batches, since the activations of all images at once take too much memory.
    for batch in images.split(256):
        latents = autoencoder.encode(batch).latent_dist.mean
        decoded.append(autoencoder.decode(latents).sample)
    pixels = to_pixels(torch.cat(decoded))
    verdicts = verify(pixels, captions)
    return float(np.mean([verdict.strict for verdict in verdicts]))


@torch.no_grad()
def evaluate(
    generator: Generator, autoencoder: Network, count: int, grid: Path | None = None
) -> dict[str, float]:
    """Return the strict score per family and overall, the soft score and the share of clean objects
    after 12 Euler steps without guidance.

    `grid` is where a picture of the first 98 images is written, if anywhere.
    """
    rng = random.Random("evaluate")
    captions = [sample_caption(FAMILIES[i % len(FAMILIES)], rng) for i in range(count)]
    tokens, pooled = generator.encode([caption.text for caption in captions])
    config = generator.transformer.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    # The same noise at every call, so that scores of two moments in training can be compared.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sigmas = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in torch.linspace(1, 0, 13).tolist()]
    for sigma, sigma_next in pairwise(sigmas):
        velocity = generator.velocity(x, torch.full((count,), sigma), tokens, pooled)
        x = x + (sigma_next - sigma) * velocity
    latents = x / autoencoder.config.scaling_factor
    decoded = [autoencoder.decode(batch).sample for batch in latents.split(128)]
    pixels = to_pixels(torch.cat(decoded))
    if grid is not None:
        save_grid(pixels, grid)
    return summarise(captions, verify(pixels, captions))


def save_grid(pixels: np.ndarray, path: Path) -> None:
    """Write the first 98 images in rows of 14, three times as large.

    `pixels` are (B, H, W, 3) in [0, 1].
    """
    rows = [np.concatenate(list(pixels[i : i + 14]), axis=1) for i in range(0, 98, 14)]
    colours = (np.concatenate(rows) * 255).round().astype(np.uint8)
    sheet = Image.fromarray(colours)
    # To the nearest pixel, since an image of 32 pixels is looked at pixel by pixel.
    size = (sheet.width * 3, sheet.height * 3)
    sheet.resize(size, Image.Resampling.NEAREST).save(path)


def summarise(captions: list[Caption], verdicts: list[Verdict]) -> dict[str, float]:
    """Return mean scores: overall, per family, and the share of found objects that are clean shapes
    of the palette.
    """
    families = defaultdict(list)
    strict: list[float] = []
    soft: list[float] = []
    objects: list[bool] = []
    for caption, verdict in zip(captions, verdicts, strict=True):
        families[caption.family].append(verdict.strict)
        strict.append(verdict.strict)
        soft.append(verdict.soft)
        objects += [item.is_clean for item in verdict.objects]
    scores = {
        "strict": float(np.mean(strict)),
        "soft": float(np.mean(soft)),
        # Early in training no image may hold anything that counts as an object.
        "clean_objects": float(np.mean(objects)) if objects else 0.0,
    }
    for family in FAMILIES:
        scores[f"strict_{family}"] = float(np.mean(families[family]))
    return scores


def export(folder: Path, generator: Generator, autoencoder: Network) -> None:
    """Write the pipeline in diffusers layout."""
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=generator.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=autoencoder,
        text_encoder=generator.text_encoder,
        tokenizer=generator.tokenizer,
        text_encoder_2=generator.text_encoder_2,
        tokenizer_2=generator.tokenizer,
        text_encoder_3=silent_t5(len(generator.tokenizer)),
        tokenizer_3=generator.tokenizer,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    grant_usual_mode(folder)


def silent_t5(vocab_size: int) -> T5EncoderModel:
    """Make a tiny T5 whose output is exactly zero, as StableDiffusion3Pipeline itself substitutes
    for an absent T5.

    Stock diffusers refuses to load an SD3 folder that lists no T5 unless None is passed for it by
    hand.
    """
    width = TRANSFORMER["joint_attention_dim"]
    config = T5Config(
        vocab_size=vocab_size,
        d_model=width,
        d_kv=8,
        d_ff=8,
        num_heads=1,
        num_layers=1,
        pad_token_id=1,
    )
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder
