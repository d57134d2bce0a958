"""The networks of a configuration on PyTorch's meta device, and what a process of a run with them
would take: bytes of each phase, and operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowrl.algorithm import Algorithm
from flowrl.cli.plan_costs import Costs, Work
from flowrl.cli.plan_direct import draw_with_graph
from flowrl.cli.plan_division import Gathered, can_be_divided, count_gathered
from flowrl.cli.plan_teachers import bytes_of, read_teachers, teach, with_unnamed
from flowrl.cli.plan_work import count_work
from flowrl.launch.checks import (
    check_division,
    check_guidance,
    check_trainer,
    divides_weights,
    has_8_bits,
    has_replicas,
)
from flowrl.models.backend import recompute_blocks
from flowrl.models.experts import networks_of
from flowrl.models.loading import EMBEDDED, META, resolve
from flowrl.models.meta_memory import flops_of, peak_of, size, step_at_once, tokens_of
from flowrl.models.published import text_parameters
from flowrl.models.quantization import QuantizedLinear
from flowrl.models.weights import DTYPES
from flowrl.objectives import check_method, num_kept, stochastic_steps
from flowrl.rewards.parameters import ScorerNetwork, networks_of_reward
from flowrl.training import eight_bits
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.best_worst import Choice
from flowrl.training.reward import MOST_WAITING
from flowrl.training.scouting import check_scouting
from flowrl.tuning.protocol import TuningRecipe
from flowrl.types import Conditioning


class Plan:
    """The networks of one configuration on the meta device, for one process."""

    def __init__(self, cfg: DictConfig) -> None:
        check_guidance(cfg)
        check_trainer(cfg)
        self.cfg = cfg
        self.method: Algorithm = instantiate(cfg.algorithm)
        check_method(self.method)
        self.plan: BatchPlan = instantiate(cfg.batch).suited_to(self.method.loss)
        self.scouting: Choice | None = instantiate(cfg.get("scouting"))
        check_scouting(self.scouting, self.plan, self.method)
        name = cfg.model.pretrained
        self.source = resolve(name) if name.startswith(EMBEDDED) else str(Path(name).expanduser())
        self.model: Any = instantiate(cfg.model, pretrained=META + self.source)
        self.recipe: TuningRecipe = instantiate(cfg.tuning)
        self.recipe.check_layers(self.model.transformer)
        check_division(cfg, self.model.transformer)
        planned = read_teachers(cfg, self.model.transformer)
        with torch.device("meta"):
            self.tuning = self.recipe.attach(self.model.transformer, seed=0)
        # Compiled, or with another attention, nothing could be counted.
        instantiate(cfg.backend, compile=False, attention=None).apply(self.model)
        self.is_checkpointed: bool = cfg.backend.gradient_checkpointing
        self.ref_scale = self.method.penalty.guidance_scale if self.method.needs_reference else None
        self.stochastic = stochastic_steps(self.method, iteration=0, seed=0, prompt=0)
        self.num_kept = num_kept(self.method)
        self.slices = cfg.backend.slice_decoding
        self.parts = self.plan.num_processes if divides_weights(cfg) else 1
        self.trained = self.tuning.parameters()
        self.whole = sum(value.nbytes for value in self.trained.values())
        self.share = self.whole // self.parts
        self.teachers = with_unnamed(planned, cfg, self.tuning)
        # Copies of the trained weights while others stand in their place: Diffusion-NFT's old ones
        # in rollouts and updates; the reference where its weights are divided, since then a pass
        # reads them in place. A LoRA that began from none is switched off instead.
        self.aside_for_old = self.share if self.method.loss.kind == "forward" else 0
        has_weights = self.tuning.reference is not None
        self.aside_for_ref = self.share if self.parts > 1 and has_weights else 0
        for parameter in self.trained.values():
            parameter.grad = torch.empty_like(parameter)  # counted among what is there all along
        reward: Any = OmegaConf.to_container(cfg.reward, resolve=True)
        self.scorers: list[ScorerNetwork] = networks_of_reward(reward)
        self._drawing: dict[int, tuple[int, int]] = {}
        self._terms: dict[bool | None, int] = {}

    def conditioning(self, rows: int) -> Conditioning:
        """Make the embeddings of so many prompts, with the negative prompt's where there is one."""
        usual = next(iter(networks_of(self.model.transformer).values())).dtype
        tensors = {}
        # An adapter of an earlier version does not say them.
        dtypes = getattr(self.model, "conditioning_dtypes", {})
        for name, shape in self.model.conditioning_shapes.items():
            dtype = dtypes.get(name, usual)
            tensors[name] = torch.empty(rows, *shape, dtype=dtype, device="meta")
        has_negative = self.model.negative_prompt is not None
        return Conditioning(tensors, Conditioning(tensors) if has_negative else None)

    def weights(self) -> dict[str, int]:
        """Count what is there all along, from the first optimizer step on, by name."""
        share = self.share
        reference = self.tuning.reference or {}
        # All trained: the start and buffers. LoRA: the base, and the LoRA that it began from.
        # Buffers are not divided.
        buffers = sum(value.nbytes for value in self.model.transformer.buffers())
        frozen = size(self.model.transformer) - self.whole - buffers
        frozen += sum(value.nbytes for value in reference.values())
        return {
            "frozen weights": frozen // self.parts + buffers,
            "autoencoder": size(self.model.vae),
            "trained weights": share,
            "their gradients": share,
            "buckets of gradients": share if has_replicas(self.cfg) else 0,
            "optimizer": self.optimizer[0],
            "EMA": share,
            "old policy": self.aside_for_old,
            "teachers": bytes_of(self.teachers),
            "scorers": self.scorers_size,
        }

    @property
    def scorers_size(self) -> int:
        """Return the bytes of all scorers' networks whose size is known."""
        return sum(network.num_bytes for network in self.scorers)

    @cached_property
    def optimizer(self) -> tuple[int, int]:
        """Count what the optimizer keeps, and what a step takes on top of that."""
        optimizer = instantiate(self.cfg.optimizer)(list(self.trained.values()))
        if has_8_bits(self.cfg):
            # Its kernels work in place.
            return eight_bits.first_state(optimizer), 0
        if self.parts == 1:
            step_at_once(optimizer)
        optimizer.step()
        num_bytes = 0
        for state in optimizer.state.values():
            # Step counts are on the CPU.
            on_device = [value for value in state.values() if torch.is_tensor(value)]
            num_bytes += sum(value.nbytes for value in on_device if value.is_meta)
        return num_bytes // self.parts, peak_of(optimizer.step) // self.parts

    @cached_property
    def gathered(self) -> Gathered:
        """Count what of divided weights is whole, if they are divided."""
        if self.parts == 1:
            return Gathered(0, 0)
        return count_gathered(self.model.transformer, self.trained.values())

    @torch.no_grad()
    def look(self, x: Tensor, embeddings: Conditioning, scale: float, aside: int) -> None:
        """Make a pass without gradients, with so many bytes of weights set aside."""
        held = torch.empty(aside, dtype=torch.uint8, device="meta")
        self.model.velocity(x, 0.5, embeddings, scale)
        del held

    @property
    def can_checkpoint(self) -> bool:
        """True where the network can recompute its blocks in backward passes."""
        networks = networks_of(self.model.transformer).values()
        return all(getattr(net, "_supports_gradient_checkpointing", False) for net in networks)

    @contextmanager
    def checkpointing(self, is_checkpointed: bool | None) -> Iterator[None]:
        """Run updates with gradient checkpointing or without; None is as configured."""
        if is_checkpointed is None or is_checkpointed == self.is_checkpointed:
            yield
            return
        recompute_blocks(self.model, is_checkpointed)
        try:
            yield
        finally:
            recompute_blocks(self.model, self.is_checkpointed)

    def update(self, x: Tensor, embeddings: Conditioning) -> None:
        """Make the passes of one term of an update, forwards and backwards."""
        if self.method.loss.kind == "direct":
            outcome = draw_with_graph(self, x, embeddings)
        else:
            outcome = self.model.velocity(x, 0.5, embeddings, self.method.scale_of_updates)
        if self.ref_scale is not None:
            self.look(x, embeddings, self.ref_scale, self.aside_for_ref)
        teach(self, x, embeddings)
        outcome.square().mean().backward()

    def drawing(self, rows: int) -> tuple[int, int]:
        """Count a rollout's pass and the decoding of so many rows, once: whether blocks are
        recomputed changes neither.
        """
        if rows not in self._drawing:
            x = self.noise(rows)
            embeddings = self.conditioning(rows)
            scale = self.method.guidance_scale
            network = peak_of(lambda: self.look(x, embeddings, scale, self.aside_for_old))
            self._drawing[rows] = (network + self.gathered.in_pass, self.decode(rows))
        return self._drawing[rows]

    def costs(self, rows: int, is_checkpointed: bool | None = None) -> Costs:
        """Count the bytes of each phase with micro-batches of so many rows, with gradient
        checkpointing or without; None is as configured.
        """
        x = self.noise(rows)
        embeddings = self.conditioning(rows)
        with self.checkpointing(is_checkpointed):
            update = peak_of(lambda: self.update(x, embeddings))
        rollout, decode = self.drawing(rows)
        prompts = self.prompts(rows, embeddings)
        # A micro-batch's states, until it is drawn and they go to the host, and then one step's.
        kept = 3 * self.num_kept * x.nbytes
        return Costs(
            sum(self.weights().values()),
            self.iteration(rows, embeddings),
            rollout + prompts + kept,
            decode + self.aside_for_old + kept,
            max(update + self.gathered.in_update + 3 * x.nbytes, rollout) + prompts,
            self.optimizer[1],
            self.evaluation,
        )

    @cached_property
    def operations(self) -> tuple[int, int]:
        """Count the operations of a rollout's pass for one row, and those of decoding it."""
        x = self.noise(1)
        embeddings = self.conditioning(1)
        network = flops_of(lambda: self.look(x, embeddings, self.method.guidance_scale, 0))
        return network, flops_of(lambda: self.model.decode(x))

    @cached_property
    def num_tokens(self) -> int:
        """Return the tokens of a row in the network; guidance that goes through it in one pass
        with the prompt has as many again.
        """
        arguments = (self.noise(1), self.conditioning(1), self.method.guidance_scale, 0)
        return tokens_of(self.model.transformer, lambda: self.look(*arguments))

    def work(self, is_checkpointed: bool | None = None) -> Work:
        """Count the operations behind one image of an iteration, with gradient checkpointing or
        without; None is as configured. Rows that begin equal are counted each.
        """
        return count_work(self, is_checkpointed)

    def operations_of_term(self, is_checkpointed: bool | None) -> int:
        """Count the operations of one row's term of an update, the old policy's left out."""
        if is_checkpointed not in self._terms:
            x = self.noise(1)
            embeddings = self.conditioning(1)
            with self.checkpointing(is_checkpointed):
                self._terms[is_checkpointed] = flops_of(lambda: self.update(x, embeddings))
        return self._terms[is_checkpointed]

    def extrapolated(self, rows: int, one: Costs, two: Costs) -> Costs:
        """Return the costs of micro-batches of so many rows without a pass of theirs, from those of
        one row and of two.
        """
        # What an iteration holds is counted anew: images that wait stop growing with the rows once
        # all of a process's samples are among them.
        return replace(
            two.beyond(one, rows - 2),
            iteration=self.iteration(rows, self.conditioning(1)),
        )

    @cached_property
    def evaluation(self) -> int:
        """Count what an evaluation takes while gradients and optimizer state are there: a copy of
        the trained weights, whose place the average's take (so does an export); a set's initial
        noise; a batch; images until they are scored. Of sets whose number of prompts has no bound,
        a batch is counted.
        """
        settings = self.cfg.evaluation
        rows = self.cfg.evaluation.batch_size
        x = self.noise(rows)
        embeddings = self.conditioning(rows)
        aside = self.aside_for_ref if settings.kl_samples else 0
        network = (
            peak_of(lambda: self.look(x, embeddings, settings.guidance_scale, aside))
            + self.gathered.in_pass
        )
        count = (settings.max_prompts or 0) * settings.images_per_prompt
        share = -(-count // self.plan.num_processes)
        held = self.images(rows, share) + count * self.noise(1).nbytes
        return self.share + held + max(network + self.prompts(rows, embeddings), self.decode(rows))

    def noise(self, rows: int) -> Tensor:
        """Make latents of so many rows."""
        return torch.empty(rows, *self.model.latent_shape, device="meta")

    def decode(self, rows: int) -> int:
        """Count what decoding takes, with the images that it gives."""
        latents = self.noise(1 if self.slices else rows)
        return peak_of(lambda: self.model.decode(latents)) + 4 * 3 * rows * self.pixels

    @cached_property
    def picture(self) -> tuple[int, int, int]:
        """Return the frames of what is drawn, one where it is an image, its height and width."""
        *frames, _, height, width = self.model.decode(self.noise(1)).shape[1:]
        return (frames[0] if frames else 1), height, width

    @property
    def pixels(self) -> int:
        """Return the number of pixels of an image, or of all frames of a clip."""
        return math.prod(self.picture)

    def images(self, rows: int, count: int) -> int:
        """Count the images of `count` that wait for their scores, at worst, in batches of so many
        rows.
        """
        return 12 * self.pixels * min(count, (MOST_WAITING + 1) * rows)

    @property
    def samples(self) -> int:
        """Return the number of samples of an iteration that a process draws."""
        return self.plan.num_samples // self.plan.num_processes

    def iteration(self, rows: int, embeddings: Conditioning) -> int:
        """Count what a process holds of all its samples: their last states, images that wait for
        their scores, and its prompts once, for micro-batches that divide a group or hold whole
        ones.
        """
        num_prompts = -(-self.samples // self.plan.group_size)
        # Candidates are scored before the first rollout, and nothing but their images is held.
        per_prompt = self.plan.group_size if self.scouting is None else self.scouting.candidates
        most = self.samples * per_prompt // self.plan.group_size
        held = self.samples * self.noise(1).nbytes + self.images(rows, most)
        return held + num_prompts * self.prompt(embeddings)

    def host(self) -> int:
        """Count what a process keeps of an iteration in the host's memory: states, next states and
        means of trained steps.
        """
        return self.samples * 3 * self.num_kept * self.noise(1).nbytes

    def loading(self) -> int:
        """Count what a process takes of the host's memory at worst while it loads, as far as it is
        known: scorers, transformer with what is trained, its average, the old policy's and where it
        started, and autoencoder lie there until training starts, and the text encoders are loaded
        beside them. A transformer that is held in fewer bits is whole before that.
        """
        reference = self.tuning.reference or {}
        num_copies = 2 if self.method.loss.kind == "forward" else 1
        held = size(self.model.transformer) + num_copies * self.whole
        held += sum(value.nbytes for value in reference.values()) + bytes_of(self.teachers)
        most = max(held + (self.text_encoders() or 0), self.released())
        return most + size(self.model.vae) + self.scorers_size

    def released(self) -> int:
        """Count the bytes of the transformer before any of its layers are held in fewer bits."""
        itemsize = DTYPES[self.cfg.model.dtype].itemsize
        num_bytes = size(self.model.transformer)
        for layer in self.model.transformer.modules():
            if isinstance(layer, QuantizedLinear):
                whole = layer.in_features * layer.out_features * itemsize
                num_bytes += whole + (0 if layer.bias is None else layer.bias.nbytes) - size(layer)
        return num_bytes

    def prompt(self, embeddings: Conditioning) -> int:
        """Count the bytes of one prompt's embeddings."""
        return embeddings.nbytes // len(embeddings)

    def prompts(self, rows: int, embeddings: Conditioning) -> int:
        """Count the prompts that are copied for each row while a velocity field is at work, as the
        negative prompt is.
        """
        return rows * self.prompt(embeddings) * (1 if embeddings.negative is None else 2)

    def text_encoders(self) -> int | None:
        """Count the bytes of the text encoders; None where the model is not a released one."""
        count = text_parameters(self.source)
        return None if count is None else count * DTYPES[self.cfg.model.dtype].itemsize

    def micro_batches(self) -> list[int]:
        """List the numbers of rows that a process's share of an update can be divided into."""
        return self.plan.micro_batches_up_to(self.plan.samples_per_process)

    def remedies(self, costs: Costs) -> str:
        """Name what may be changed where not even these costs fit."""
        keys = [
            "batch.num_processes (more GPUs)",
            "batch.prompts_per_iteration",
            "model.resolution",
        ]
        if costs.peak == costs.fixed + costs.evaluation:
            keys.insert(0, "evaluation.batch_size, evaluation.max_prompts")
        if self.scorers_size:
            keys.append("reward (a smaller one, or one that is served: reward=remote)")
        if self.parts == 1 and can_be_divided(self.model.transformer):
            keys.insert(0, "trainer=fsdp (weights divided over GPUs)")
        return ", ".join(keys)
