"""The policy: rollout, reward, advantage and updates as one LightningModule with manual
optimisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from flowrl.algorithm import Algorithm
from flowrl.diagnostics import bound
from flowrl.errors import UserError
from flowrl.gaussian import GaussianStep
from flowrl.losses.nft import NFT
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.protocol import FlowModel
from flowrl.noise import INITIAL, gaussian_noise
from flowrl.objectives.gate import check_replay
from flowrl.parallel.sharding import part_of
from flowrl.parallel.strategies import clip, shard, synchronised
from flowrl.rollout import replay, rollout
from flowrl.runs import glossary
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.ema import EMA
from flowrl.training.learning import Learning
from flowrl.training.metric_means import Clock, NotFinite, Record, record_rewards
from flowrl.training.micro_batch import Group, MicroBatch
from flowrl.training.prompt_data import PromptBatch
from flowrl.training.reference import ReferenceModule
from flowrl.training.reward import RewardModule
from flowrl.tuning.protocol import Tuning
from flowrl.tuning.weights import load
from flowrl.types import Conditioning


class Policy(LightningModule):
    """A base model with LoRA, trained by policy gradients on its own samples.

    One `training_step` is one iteration. Only LoRA weights are trained, averaged, checkpointed and
    exported.
    """

    model: FlowModel
    reward: RewardModule
    reference: ReferenceModule

    def __init__(
        self,
        *,
        model: FlowModel,
        tuning: Tuning,
        reward: RewardModule,
        reference: ReferenceModule,
        algorithm: Algorithm,
        plan: BatchPlan,
        optimizer: Callable[..., Optimizer],
        learning_rate: Callable[[float], float],
        ema: EMA,
        max_grad_norm: float,
        gate_tolerance: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tuning = tuning
        self.transformer = model.transformer.eval()
        # Plain attributes, not children: frozen modules stay out of the policy's parameters and
        # state.
        self.__dict__.update(model=model, reward=reward, reference=reference)
        self.algorithm = algorithm
        self.plan = plan
        self.ema = ema
        self.make_optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.learning_rate = learning_rate
        self.gate_tolerance = gate_tolerance
        self.seed = seed
        self.num_iterations = 0
        self.num_optimizer_steps = 0
        self.has_passed_gate = False
        self.learning = Learning()
        self.last_metrics: dict[str, float] = {}
        self.embed: (
            PromptEmbeddings  # of every prompt the run will use; must be set before training
        )
        ema.start(self.tuning.parameters())

    def configure_model(self) -> None:
        """Where the strategy divides the weights, divide their copies alike; called before the
        optimizer is made.
        """
        if shard(self, self.transformer, self.tuning.reference):
            own = self.tuning.parameters()
            copies = self.weights().items()
            self.load_weights(
                {
                    kind: {name: part_of(v, own[name]) for name, v in ws.items()}
                    for kind, ws in copies
                }
            )

    def configure_optimizers(self) -> Optimizer:
        """The configured optimizer over the LoRA weights alone."""
        optimizer = self.make_optimizer(list(self.tuning.parameters().values()))
        self.rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def training_step(self, batch: PromptBatch, batch_index: int) -> None:
        """One iteration: rollouts under the current weights, rewards, advantages, updates."""
        clock = Clock()
        record = Record()
        with self.behaviour():
            updates = [
                [self.sample(batch, rows) for rows in update]
                for update in self.plan.updates(self.global_rank)
            ]
        clock.lap("perf/rollout_seconds")
        self.assign_advantages([part for update in updates for part in update], record)
        clock.lap("perf/reward_seconds")
        if not self.has_passed_gate:
            self.check_gate(updates[0][0])
        self.set_learning_rate(batch.progress, record)
        self.algorithm.begin(batch.progress)
        for _ in range(self.plan.inner_epochs):
            for update in updates:
                self.update(update, record)
        self.follow()
        clock.lap("perf/update_seconds")
        self.num_iterations = batch.iteration + 1
        values = record.means()
        self.algorithm.observe(values, self.plan.inner_epochs * len(updates))
        values |= bound(values, len(updates[0][0].trajectory.steps))
        self.report(values | clock.report(self.plan.num_samples))

    @torch.no_grad()
    def sample(self, batch: PromptBatch, rows: range) -> MicroBatch:
        """Roll out the samples numbered `rows` of this iteration, decode them and start scoring
        them.
        """
        method = self.algorithm
        members = [divmod(row, self.plan.group_size) for row in rows]
        prompts = [batch.prompts[prompt] for prompt, _ in members]
        noise = partial(
            gaussian_noise, self.model.latent_shape, seed=self.seed, iteration=batch.iteration
        )
        starts = [(prompt, 0) for prompt, _ in members] if method.shared_initial_noise else members
        group = Group(*self.embed.shared(prompts), starts)
        trajectory = rollout(
            group.field(self.velocity),
            noise(samples=starts, step=INITIAL).to(self.device),
            method.intervals,
            sampler=method.sampler,
            stochastic=method.stochastic(batch.iteration, self.seed),
            noise=lambda k: noise(samples=members, step=k),
            likelihood=method.likelihood,
            shares_start=method.shared_initial_noise,
        )
        score = self.reward.submit(self.model.decode(trajectory.x0), prompts)
        advantage = torch.zeros(len(rows), device=self.device)
        return MicroBatch(
            rows, batch.iteration, prompts, group, trajectory, score, advantage, advantage == 0
        )

    def velocity(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The current policy's velocity, at the rollout's guidance scale."""
        return self.model.velocity(x, sigma, conditioning, self.algorithm.guidance_scale)

    def replay(self, part: MicroBatch, index: int) -> GaussianStep:
        """The Gaussian of a micro-batch's `index`-th trained step under the current weights."""
        field = part.group.field(self.velocity)
        method = self.algorithm
        return replay(field, part.trajectory, index, method.intervals, method.sampler)

    def assign_advantages(self, parts: list[MicroBatch], record: Record) -> None:
        """Wait for all scores and give every sample its advantage, from statistics over all
        processes.
        """
        output = self.reward.collect([part.score for part in parts])
        rows = torch.tensor([row for part in parts for row in part.rows])
        assert output.terms is not None
        terms = self.gather(output.terms)
        is_valid = self.gather(output.is_valid)
        order = self.gather(rows)
        self.reward.check(is_valid, terms, output.info)
        weights = torch.tensor(output.weights)
        values = self.reward.total(terms, weights)
        advantages = self.algorithm.advantage(
            terms, weights, order // self.plan.group_size, is_valid
        )
        by_row = torch.zeros(self.plan.num_samples).index_copy(0, order, advantages.values)
        is_used = torch.zeros(self.plan.num_samples, dtype=torch.bool).index_copy(
            0, order, advantages.is_used
        )
        for part in parts:
            part.advantage = by_row[list(part.rows)].to(self.device)
            part.is_used = is_used[list(part.rows)].to(self.device)
        if not advantages.values.isfinite().all():
            raise NotFinite("an advantage is NaN or infinite: look at the rewards' weights")
        self.learning.take(bool((is_valid & values.isfinite()).any()), advantages)
        record_rewards(record, output, values, is_valid)
        for name, value in advantages.metrics().items():
            record.add(name, value)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, in rank order, on the CPU."""
        if self.plan.num_processes == 1:
            return values
        gathered = self.all_gather(values.to(self.device))
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1).cpu()

    def set_learning_rate(self, progress: float, record: Record) -> None:
        """The optimizer's own rates times the schedule's factor."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.learning_rate(progress)
        record.add("update/learning_rate", optimizer.param_groups[0]["lr"])

    def update(self, parts: list[MicroBatch], record: Record) -> None:
        """One optimizer step on the mean loss over the update's samples and trained steps."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        terms = [(part, index) for part in parts for index in range(self.num_terms(part))]
        for i, (part, index) in enumerate(terms):
            with synchronised(self, is_last=i == len(terms) - 1):
                self.manual_backward(self.term_loss(part, index, record) / len(terms))
        parameters = list(self.tuning.parameters().values())
        norm = clip(parameters, self.max_grad_norm)
        if not norm.isfinite():
            raise NotFinite(
                f"gradient norm {float(norm)} before optimizer step "
                f"{self.num_optimizer_steps + 1}: stopped"
            )
        size = sum(parameter.numel() for parameter in parameters)
        record.add("update/grad_norm", norm)
        record.add("update/grad_rms_over_eps", norm / size**0.5 / optimizer.param_groups[0]["eps"])
        with self.learning.watch(parameters, norm):
            optimizer.step()
        self.num_optimizer_steps += 1
        self.ema.update(self.tuning.parameters(), self.num_optimizer_steps)

    def behaviour(self) -> AbstractContextManager[None]:
        """Under which weights rollouts are drawn: the current ones."""
        return nullcontext()

    def num_terms(self, part: MicroBatch) -> int:
        """How many backward passes a micro-batch needs: one for each trained step."""
        return len(part.trajectory.steps)

    def follow(self) -> None:
        """What happens to the old policy after an iteration's updates: it is the current one
        anyway.
        """

    def term_loss(self, part: MicroBatch, index: int, record: Record) -> Tensor:
        """Policy loss plus reference penalty of one micro-batch at one trained step."""
        method = self.algorithm
        trajectory = part.trajectory
        step = self.replay(part, index)
        inputs = method.compare(step, trajectory, index, part.advantage)
        assert not isinstance(method.loss, NFT)
        output = method.loss(inputs)
        loss = output.loss
        record.add("loss/policy", loss)
        if method.penalty.beta:
            ref_mean = self.reference.mean(
                trajectory, index, part.group, method.intervals, method.sampler
            )
            interval = method.intervals[trajectory.steps[index]]
            penalty = method.penalty(step, ref_mean, interval, method.sampler.gain(interval)).mean()
            loss = loss + method.penalty.beta * penalty
            record.add("loss/penalty", penalty)
        for name, value in (
            output.metrics | method.diagnose(inputs, trajectory.steps[index])
        ).items():
            record.add(name, value, term=(self.num_optimizer_steps, index))
        return loss

    def check_gate(self, part: MicroBatch) -> None:
        """Before the first update, replay must give ratio 1 and divergence 0, in training mode, or
        the run stops.
        """
        check_replay(
            part.trajectory,
            partial(self.replay, part),
            self.algorithm.likelihood,
            self.gate_tolerance,
        )
        self.has_passed_gate = True

    def describe_plan(self) -> str:
        """The batch plan in words, with the number of trained steps."""
        return self.plan.describe(len(self.algorithm.stochastic(0, self.seed)))

    def report(self, values: Mapping[str, float]) -> None:
        """Log one iteration's metrics: trackers, progress bar, and `last_metrics` for the run's own
        record.
        """
        counters = {
            "iteration": self.num_iterations,
            "samples": self.num_iterations * self.plan.num_samples,
        }
        glossary.check(values)
        self.last_metrics = {**counters, **values}
        self.log_to_trackers(self.last_metrics)
        shown = {"reward": "reward/mean", "kl": "trust/kl_old", "masked": "trust/masked_fraction"}
        bar = {label: values[name] for label, name in shown.items() if name in values}
        self.log_dict(
            bar | {"img/s": values["perf/images_per_second"]}, prog_bar=True, logger=False
        )

    def log_evaluation(self, values: Mapping[str, float]) -> None:
        """Log evaluation metrics against the iteration axis."""
        glossary.check(values)
        self.log_to_trackers({"iteration": self.num_iterations, **values})

    def log_to_trackers(self, values: Mapping[str, float]) -> None:
        """Training and evaluation share one axis, the iteration, which continues where a resumed
        run left off.
        """
        for logger in self.loggers:
            logger.log_metrics(
                {name: float(value) for name, value in values.items()}, step=self.num_iterations
            )

    def on_fit_start(self) -> None:
        """Check the number of processes, and move the frozen parts, which Lightning does not know
        of.
        """
        if self.trainer.world_size != self.plan.num_processes:
            raise UserError(
                f"trainer.devices and trainer.num_nodes make {self.trainer.world_size} processes, "
                "but "
                f"batch.num_processes={self.plan.num_processes}; make them equal"
            )
        for frozen in (self.model, self.embed, self.reward):
            frozen.to(self.device)

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """The LoRA weights that a checkpoint needs, by what they are."""
        return {"lora": self.tuning.parameters(), "ema": self.ema.weights}

    def load_weights(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        """Take back what `weights` gave."""
        load(self.tuning.parameters(), weights["lora"])
        self.ema.weights = weights["ema"]

    def state(self) -> dict[str, Any]:
        """Counters that, with LoRA, EMA and optimizer, make up a checkpoint."""
        counters = {name: getattr(self, name) for name in ("num_iterations", "num_optimizer_steps")}
        return counters | {"learning": self.learning.state()} | self.algorithm.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.num_iterations = state["num_iterations"]
        self.num_optimizer_steps = state["num_optimizer_steps"]
        self.learning.load_state(state.get("learning"))
        self.algorithm.load_state(state)
