"""Pretrain the embedded shapes pipeline: autoencoder, then transformer and text encoders, then export.

    python scripts/pretrain_shapes.py --work outputs/pretrain          # about 80 minutes on two cores

Stages run in order and resume where they stopped (`--work` keeps checkpoints, a log and sample grids):
`autoencoder`; `clean` (flow matching on true captions to convergence); `corrupted` (the same on captions with words
replaced at fixed rates, which makes the able but unreliable model that reinforcement learning starts from);
`export` (a StableDiffusion3Pipeline folder in diffusers layout, float16 safetensors, with its metrics).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import string
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from flowrl.shapes.grammar import FAMILIES, WORDS, Caption, corrupt, sample_caption
from flowrl.shapes.render import lay_out, render
from flowrl.shapes.verify import Verdict, verify

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 24, 48),
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 4,
    "sample_size": 32,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
KL_WEIGHT = 1e-4
TEXT_WIDTH = 64
NUM_TOKENS = 10
TEXT_ENCODER = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "projection_dim": TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": NUM_TOKENS,
}
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "joint_attention_dim": 2 * TEXT_WIDTH,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 2 * TEXT_WIDTH,
    "pos_embed_max_size": 8,
}
SHIFT = 2.0
CORRUPTION = {"colour": 0.2, "shape": 0.1, "count": 0.2, "relation": 0.2}
CAPTION_DROPOUT = 0.05
NUM_LATENTS = 120_000


def draw_scenes(count: int, rng: random.Random) -> tuple[list[Caption], Tensor]:
    """Captions of all families in equal shares and their images, float32 in [-1, 1], shape (count, 3, H, W)."""
    captions = [sample_caption(rng.choice(FAMILIES), rng) for _ in range(count)]
    images = torch.from_numpy(render([lay_out(caption, rng) for caption in captions]))
    return captions, images.permute(0, 3, 1, 2) * 2 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """Images in [-1, 1], (B, 3, H, W), as the verifier wants them: (B, H, W, 3) in [0, 1]."""
    return (images.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 3 % of the steps, then cosine to zero."""
    warm = max(1, int(0.03 * num_steps))
    return peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps))))


class Log:
    """Metrics of the pretraining, printed and appended to `log.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.time()

    def write(self, **row: float | str) -> None:
        row["seconds"] = round(time.time() - self.start, 1)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def save_checkpoint(path: Path, **state: object) -> None:
    """Write atomically, so that an interrupted save leaves the previous checkpoint."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train_autoencoder(work: Path, log: Log, num_steps: int, batch_size: int, peak: float) -> AutoencoderKL:
    """Stage 1: mean squared and absolute error plus a light KL, on fresh scenes."""
    torch.manual_seed(1)
    autoencoder = AutoencoderKL(**AUTOENCODER)
    autoencoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    path, start = work / "autoencoder.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        autoencoder.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
    for step in range(start, num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak)
        _, images = draw_scenes(batch_size, random.Random(f"autoencoder {step}"))
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(images).latent_dist
        error = autoencoder.decode(posterior.sample(torch.Generator().manual_seed(step))).sample - images
        loss = error.square().mean() + 0.2 * error.abs().mean()
        loss = loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == num_steps:
            strict = reconstruction_score(autoencoder, 512)
            log.write(stage="autoencoder", step=step + 1, loss=loss.item(), reconstruction_strict=strict)
            save_checkpoint(path, model=autoencoder.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    return autoencoder.eval()


@torch.no_grad()
def reconstruction_score(autoencoder: AutoencoderKL, count: int) -> float:
    """Strict score of the verifier on reconstructions of `count` unseen scenes."""
    captions, images = draw_scenes(count, random.Random("reconstruction"))
    decoded = [autoencoder.decode(autoencoder.encode(part).latent_dist.mean).sample for part in images.split(256)]
    return float(np.mean([verdict.strict for verdict in verify(to_pixels(torch.cat(decoded)), captions)]))


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token and other words fall back to letters."""
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
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # The trainer numbers the alphabet in an order that changes from process to process: number everything here.
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=merges, model_max_length=NUM_TOKENS
    )


class Generator(nn.Module):
    """What stage 2 trains: the transformer and the two text encoders, and how a caption conditions them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(self.tokenizer)}
        config = CLIPTextConfig(**TEXT_ENCODER, **special)
        self.text_encoder = CLIPTextModelWithProjection(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(config)
        self.transformer = SD3Transformer2DModel(**TRANSFORMER)
        self._ids: dict[str, Tensor] = {}

    def token_ids(self, texts: list[str]) -> Tensor:
        for text in set(texts) - self._ids.keys():
            ids = self.tokenizer(text, padding="max_length", max_length=NUM_TOKENS, truncation=True).input_ids
            self._ids[text] = torch.tensor(ids)
        return torch.stack([self._ids[text] for text in texts])

    def encode(self, texts: list[str], num_pads: int = 0) -> tuple[Tensor, Tensor]:
        """Token embeddings (B, NUM_TOKENS + num_pads, D) and pooled ones (B, D), as StableDiffusion3Pipeline does.

        `num_pads` zero tokens stand where T5's would: the stock pipeline appends `max_sequence_length` of them.
        """
        ids = self.token_ids(texts)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        pooled = torch.cat([output.text_embeds for output in outputs], dim=-1)
        pads = tokens.new_zeros(len(texts), num_pads, tokens.shape[-1])
        return torch.cat([tokens, pads], dim=1), pooled

    def velocity(self, x: Tensor, sigma: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        return self.transformer(x, tokens, pooled, sigma * 1000, return_dict=False)[0]


@torch.no_grad()
def encode_latents(work: Path, autoencoder: AutoencoderKL) -> tuple[list[Caption], Tensor, float]:
    """Captions and latents of NUM_LATENTS scenes, float16 and scaled to unit variance, and the scale used."""
    path = work / "latents.pt"
    captions, parts = [], []
    cached = torch.load(path, weights_only=True) if path.exists() else None
    for start in range(0, NUM_LATENTS, 2000):
        rng = random.Random(f"latents {start}")
        if cached is not None:
            captions += [sample_caption(rng.choice(FAMILIES), rng) for _ in range(2000)]
            continue
        chunk, images = draw_scenes(2000, rng)
        captions += chunk
        parts += [autoencoder.encode(part).latent_dist.mean for part in images.split(250)]
    if cached is None:
        latents = torch.cat(parts)
        scale = float(1 / latents.std())
        cached = {"latents": (latents * scale).half(), "scale": scale}
        torch.save(cached, path)
    return captions, cached["latents"], cached["scale"]


def make_optimizers(generator: Generator, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices = [p for p in generator.transformer.transformer_blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in generator.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0)]


def train_generator(
    work: Path,
    log: Log,
    stage: str,
    generator: Generator,
    data: tuple[list[Caption], Tensor],
    decode: AutoencoderKL,
    num_steps: int,
    batch_size: int,
    peak: float,
    rates: dict[str, float] | None,
) -> Generator:
    """Stage 2: flow matching, `mean (velocity - (noise - data))^2`; returns the averaged weights.

    With `rates`, every view of a scene gets a freshly corrupted caption. A few batches carry T5's zero tokens, so
    that the stock pipeline's default call works as well as the short sequences used in training.
    """
    captions, latents = data
    torch.manual_seed(2)
    average = copy.deepcopy(generator)
    optimizers = make_optimizers(generator, peak)
    path, start = work / f"{stage}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        generator.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = int(state["step"])
    for step in range(start, num_steps):
        rng = random.Random(f"{stage} {step}")
        noise = torch.Generator().manual_seed(step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, num_steps, peak)
        num_pads = int(256 ** rng.random()) if rng.random() < 0.06 else 0
        chosen = [rng.randrange(len(captions)) for _ in range(batch_size // 4 if num_pads else batch_size)]
        views = [corrupt(captions[i], rates, rng) if rates else captions[i] for i in chosen]
        texts = ["" if rng.random() < CAPTION_DROPOUT else view.text for view in views]
        data_latents = latents[chosen].float()
        eps = torch.randn(data_latents.shape, generator=noise)
        sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(len(chosen), generator=noise))
        x = torch.lerp(data_latents, eps, sigma[:, None, None, None])
        tokens, pooled = generator.encode(texts, num_pads)
        loss = (generator.velocity(x, sigma, tokens, pooled) - (eps - data_latents)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), 1 - decay)
        if (step + 1) % 500 == 0 or step + 1 == num_steps:
            score = evaluate(average, decode, 350, work / f"{stage}.png")
            log.write(stage=stage, step=step + 1, loss=loss.item(), **score)
            save_checkpoint(
                path,
                model=generator.state_dict(),
                average=average.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                step=step + 1,
            )
    return average.eval()


@torch.no_grad()
def evaluate(
    generator: Generator, autoencoder: AutoencoderKL, count: int, grid: Path | None = None
) -> dict[str, float]:
    """Strict score per family and overall, soft score and share of clean objects; 12 Euler steps, no guidance."""
    rng = random.Random("evaluate")
    captions = [sample_caption(FAMILIES[i % len(FAMILIES)], rng) for i in range(count)]
    x = torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens, pooled = generator.encode([caption.text for caption in captions])
    sigmas = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in torch.linspace(1, 0, 13).tolist()]
    for sigma, sigma_next in pairwise(sigmas):
        x = x + (sigma_next - sigma) * generator.velocity(x, torch.full((count,), sigma), tokens, pooled)
    images = torch.cat([autoencoder.decode(part).sample for part in (x / autoencoder.config.scaling_factor).split(128)])
    pixels = to_pixels(images)
    if grid is not None:
        rows = [np.concatenate(list(pixels[i : i + 14]), axis=1) for i in range(0, 98, 14)]
        sheet = Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8))
        sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST).save(grid)
    return summarise(captions, verify(pixels, captions))


def summarise(captions: list[Caption], verdicts: list[Verdict]) -> dict[str, float]:
    """Mean scores: overall, per family, and the share of found objects that are clean shapes of the palette."""
    families = defaultdict(list)
    for caption, verdict in zip(captions, verdicts, strict=True):
        families[caption.family].append(verdict.strict)
    objects = [found.is_clean for verdict in verdicts for found in verdict.objects]
    return {
        "strict": float(np.mean([verdict.strict for verdict in verdicts])),
        "soft": float(np.mean([verdict.soft for verdict in verdicts])),
        "clean_objects": float(np.mean(objects)) if objects else 0.0,
        **{f"strict_{family}": float(np.mean(families[family])) for family in FAMILIES},
    }


def export(folder: Path, generator: Generator, autoencoder: AutoencoderKL) -> None:
    """Write the pipeline in diffusers layout."""
    pipeline = StableDiffusion3Pipeline(
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


def silent_t5(vocab_size: int) -> T5EncoderModel:
    """A tiny T5 whose output is exactly zero, as StableDiffusion3Pipeline itself substitutes for an absent T5.

    Stock diffusers refuses to load an SD3 folder that lists no T5 unless None is passed for it by hand.
    """
    width = TRANSFORMER["joint_attention_dim"]
    config = T5Config(vocab_size=vocab_size, d_model=width, d_kv=8, d_ff=8, num_heads=1, num_layers=1, pad_token_id=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain"), help="checkpoints, log and grids")
    parser.add_argument("--out", type=Path, default=Path("flowrl/shapes/assets/pipeline"), help="the exported pipeline")
    parser.add_argument("--autoencoder-steps", type=int, default=2500)
    parser.add_argument("--clean-steps", type=int, default=4000)
    parser.add_argument("--corrupted-steps", type=int, default=800)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    log = Log(args.work / "log.jsonl")
    autoencoder = train_autoencoder(args.work, log, args.autoencoder_steps, batch_size=32, peak=3e-3)
    captions, latents, scale = encode_latents(args.work, autoencoder)
    autoencoder.register_to_config(scaling_factor=scale, shift_factor=0.0)
    data = (captions, latents)
    torch.manual_seed(2)
    generator = Generator()
    shared = {"data": data, "decode": autoencoder, "batch_size": 192}
    clean = train_generator(
        args.work, log, "clean", generator, num_steps=args.clean_steps, peak=2e-3, rates=None, **shared
    )
    corrupted = train_generator(
        args.work,
        log,
        "corrupted",
        copy.deepcopy(clean).train(),
        num_steps=args.corrupted_steps,
        peak=5e-4,
        rates=CORRUPTION,
        **shared,
    )
    export(args.out, corrupted, autoencoder)
    metrics = {
        "reconstruction_strict": reconstruction_score(autoencoder, 5000),
        "clean": evaluate(clean, autoencoder, 2100),
        "corrupted": evaluate(corrupted, autoencoder, 2100),
    }
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    shutil.copy(log.path, args.out / "pretraining.jsonl")


if __name__ == "__main__":
    main()
