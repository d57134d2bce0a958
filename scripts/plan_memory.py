"""Estimate a run's GPU memory per phase, and the largest micro-batch that fits: no weights, no GPU.

    python scripts/plan_memory.py model=sd35_medium --gpu 24
    python scripts/plan_memory.py experiment=flow_dppo_flux2 batch.num_processes=8 --gpu 80

The networks are built on PyTorch's meta device and run there, forwards and backwards as a run would; what each
operation allocates and frees is counted, with attention as a fused kernel keeps it. The `batch.max_micro_batch` that
it proposes changes nothing but memory and speed. Kernels' own workspace is not counted, so a share of the GPU is kept
free; reward models are not counted either.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any
from weakref import finalize

import diffusers
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowrl.algorithm import Algorithm
from flowrl.batch_plan import BatchPlan
from flowrl.command import one_line_errors, register_resolvers
from flowrl.launch import check_guidance
from flowrl.models import lora
from flowrl.models.full import start_of
from flowrl.models.loading import EMBEDDED, META, resolve
from flowrl.types import Conditioning

CONF = Path(__file__).parents[1] / "conf"
GIB = 2**30
SPARE = 0.08
"""Share of the GPU left to the CUDA context, kernels' workspace and fragmentation."""

TEXT_ENCODERS = {"SD3": 5_580_000_000, "Flux1": 4_890_000_000, "Flux2Dev": 24_010_000_000}
KLEIN = {2560: 4_020_000_000, 4096: 8_190_000_000}
"""Parameters of the released text encoders, rounded: two CLIPs and T5-XXL; CLIP-L and T5-XXL; Mistral; Qwen3."""


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is active and still alive; `peak` is the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._seen | given:
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: its inputs, its output, and a number per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return FusedAttention.apply(query, key, value)


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes that were alive at once in `work`, beyond what was there before."""
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        with Peak() as counter:
            work()
        return counter.peak
    finally:
        functional.scaled_dot_product_attention = plain


def size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True)
class Costs:
    """Bytes: `fixed` always, the others on top of it in their phase, for one micro-batch and one iteration."""

    fixed: int
    iteration: int
    rollout: int
    decode: int
    update: int

    @property
    def peak(self) -> int:
        return self.fixed + self.iteration + max(self.rollout, self.decode, self.update)

    def beyond(self, other: Costs, times: int) -> Costs:
        """What lies `times` the step from `other` to these costs further on: all of it grows with the rows."""
        return Costs(*(b + times * (b - a) for a, b in zip(astuple(other), astuple(self), strict=True)))


class Plan:
    """One configuration's networks on the meta device."""

    def __init__(self, cfg: DictConfig) -> None:
        check_guidance(cfg)
        self.method: Algorithm = instantiate(cfg.algorithm)
        self.plan: BatchPlan = instantiate(cfg.batch)
        name = cfg.model.pretrained
        known = resolve(name) if name.startswith(EMBEDDED) else str(Path(name).expanduser())
        self.model: Any = instantiate(cfg.model, pretrained=META + known)
        with torch.device("meta"):
            instantiate(cfg.tuning).attach(self.model.transformer, seed=0)
        # Compiled, or with another attention, nothing could be counted.
        instantiate(cfg.backend, compile=False, attention=None).apply(self.model)
        self.ref_scale = self.method.penalty.guidance_scale if self.method.penalty.beta else None
        self.num_terms = len(self.method.stochastic(0, 0))
        self.slices = cfg.backend.slice_decoding

    def conditioning(self, rows: int) -> Conditioning:
        config, dtype = self.model.transformer.config, self.model.transformer.dtype
        length = self.model.max_sequence_length + (77 if "pos_embed_max_size" in config else 0)
        tokens = torch.empty(rows, length, config.joint_attention_dim, dtype=dtype, device="meta")
        pooled = torch.empty(rows, config.get("pooled_projection_dim") or 0, dtype=dtype, device="meta")
        return Conditioning(
            tokens, pooled, None if self.model.negative_prompt is None else Conditioning(tokens, pooled)
        )

    def weights(self) -> dict[str, int]:
        own = sum(value.nbytes for value in lora.parameters(self.model.transformer).values())
        is_full = start_of(self.model.transformer) is not None
        return {
            "frozen transformer": size(self.model.transformer) - (0 if is_full else own),
            "autoencoder": size(self.model.vae),
            "trained weights": own,
            "their gradients": own,
            "optimizer": 2 * own,
            "EMA": own,
        }

    def costs(self, rows: int) -> Costs:
        x = torch.empty(rows, *self.model.latent_shape, device="meta")
        images = torch.empty(1 if self.slices else rows, *self.model.latent_shape, device="meta")
        given, scale = self.conditioning(rows), self.method.guidance_scale
        # A group's tokens are copied for its members while a velocity field is at work, and so is the negative prompt.
        prompts = rows * self.prompt(given) * (1 if given.negative is None else 2)
        for parameter in lora.parameters(self.model.transformer).values():
            parameter.grad = torch.empty_like(parameter)  # counted among what is there all along

        def update() -> None:
            self.model.velocity(x, 0.5, given, scale).square().mean().backward()

        @torch.no_grad()
        def look(scale: float) -> None:
            self.model.velocity(x, 0.5, given, scale)

        passes = [peak_of(lambda: look(scale))]
        if self.ref_scale is not None:
            passes.append(peak_of(lambda: look(self.ref_scale)))
        return Costs(
            sum(self.weights().values()),
            self.iteration(given),
            passes[0] + prompts,
            peak_of(lambda: self.model.decode(images)) + 4 * 3 * rows * self.pixels,
            max(peak_of(update), *passes) + prompts,
        )

    @property
    def pixels(self) -> int:
        return (self.model.latent_shape[-1] * self.model.pipeline.vae_scale_factor) ** 2

    def iteration(self, given: Conditioning) -> int:
        """What a process holds of all its samples: states, next states and means of trained steps, images, and its
        prompts once, for micro-batches that divide a group or hold whole ones."""
        samples = self.plan.num_samples // self.plan.num_processes
        latent = 4 * torch.Size(self.model.latent_shape).numel()
        num_prompts = -(-samples // self.plan.group_size)
        # Images until they are scored, at worst all of them.
        held = samples * ((3 * self.num_terms + 1) * latent + 12 * self.pixels)
        return held + num_prompts * self.prompt(given)

    def prompt(self, given: Conditioning) -> int:
        """One prompt's tokens and pooled embedding."""
        return (given.tokens.nbytes + given.pooled.nbytes) // len(given.tokens)

    def text_encoders(self) -> int | None:
        kind, width = type(self.model).__name__, self.model.transformer.config.joint_attention_dim
        count = KLEIN.get(width // 3) if kind == "Flux2Klein" else TEXT_ENCODERS.get(kind)
        return None if count is None or width < 4096 else 2 * count

    def micro_batches(self) -> list[int]:
        share = self.plan.samples_per_update // self.plan.num_processes
        return [rows for rows in range(1, share + 1) if share % rows == 0]


def report(cfg: DictConfig, gpu: float) -> None:
    plan = Plan(cfg)
    room = gpu * (1 - SPARE) * GIB
    print(f"{cfg.model.pretrained}, {cfg.model.dtype}, {cfg.model.resolution} pixels; GiB per GPU")
    for name, value in plan.weights().items():
        print(f"  {name:<24}{value / GIB:>9.2f}")
    encoders = plan.text_encoders()
    if encoders is not None:
        print(f"  {'text encoders, before':<24}{encoders / GIB:>9.2f}  (dropped; the networks above come after)")
    print(f"{'micro-batch':>12}{'all along':>11}{'iteration':>11}{'rollout':>9}{'decode':>8}{'update':>8}{'peak':>8}")
    fits, one, two = None, plan.costs(1), plan.costs(2)
    for rows in plan.micro_batches():
        costs = two.beyond(one, rows - 2)
        parts = (costs.fixed, costs.iteration, costs.rollout, costs.decode, costs.update, costs.peak)
        widths = (11, 11, 9, 8, 8, 8)
        print(f"{rows:>12}" + "".join(f"{part / GIB:>{width}.2f}" for part, width in zip(parts, widths, strict=True)))
        if costs.peak > room:
            break
        fits = rows
    if fits is None:
        remedies = ["batch.num_processes (more GPUs)", "batch.prompts_per_iteration", "model.resolution"]
        if not cfg.backend.gradient_checkpointing:
            remedies.insert(0, "backend.gradient_checkpointing=true")
        print(f"nothing fits {gpu:g} GiB with {SPARE:.0%} kept free; change {', '.join(remedies)}")
    else:
        print(f"within {gpu:g} GiB, {SPARE:.0%} kept free: batch.max_micro_batch={fits}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="configuration overrides, as for train.py")
    parser.add_argument("--gpu", type=float, default=80, help="GiB of one GPU")
    args = parser.parse_intermixed_args()
    diffusers.utils.logging.set_verbosity_error()  # its warning about casts concerns weights, of which there are none
    register_resolvers()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        report(compose("config", overrides=["name=plan", *args.overrides]), args.gpu)


if __name__ == "__main__":
    raise SystemExit(one_line_errors(main))
