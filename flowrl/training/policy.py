"""The policy: rollouts, rewards, advantages and updates as one LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from flowrl.algorithm import Algorithm
from flowrl.diagnostics import bound
from flowrl.models.embeddings import PromptEmbeddings
from flowrl.models.protocol import FlowModel
from flowrl.objectives import OBJECTIVES
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.objectives.protocol import Context, Objective, Teachers
from flowrl.parallel.sharding import divide_copies
from flowrl.parallel.strategies import shard
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.best_worst import Choice
from flowrl.training.credit import score_completions
from flowrl.training.data_regularizer import DataRegularizer
from flowrl.training.ema import EMA
from flowrl.training.floor import Floor
from flowrl.training.graph import decode_with_graph, recomputes
from flowrl.training.learning import Learning
from flowrl.training.memory import memory_of_iteration
from flowrl.training.metric_means import Clock, Record
from flowrl.training.optimization import (
    at_once,
    set_learning_rate,
    step_weights,
    velocity_in_updates,
)
from flowrl.training.prompt_data import PromptBatch
from flowrl.training.reference import ReferenceModule
from flowrl.training.reporting import report_iteration
from flowrl.training.reward import RewardModule
from flowrl.training.sampling import draw, sample_update
from flowrl.training.scoring import assign_advantages
from flowrl.training.scouting import Scouting
from flowrl.tuning.protocol import Tuning
from flowrl.tuning.weights import load
from flowrl.types import Conditioning


class Policy(LightningModule):
    """A base model whose tuned weights are trained by reinforcement learning on its own samples.

    One `training_step` is one iteration, with manual optimisation. Only tuned weights are trained,
    averaged, checkpointed and exported. `embed` holds the embeddings of every prompt that the run
    will use, and must be set before training.
    """

    model: FlowModel
    reward: RewardModule
    reference: ReferenceModule
    objective: Objective
    embed: PromptEmbeddings
    rates: list[float]
    regularizer: DataRegularizer | None = None

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
        rate_factor: Callable[[float], float],
        ema: EMA,
        max_grad_norm: float,
        gate_tolerance: float,
        floor: Floor,
        seed: int,
        scouting: Choice | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tuning = tuning
        self.transformer = model.transformer.eval()
        self.algorithm = algorithm
        self.plan = plan
        self.scouting = Scouting(scouting, plan)
        self.ema = ema
        self.make_optimizer = optimizer
        self.rate_factor = rate_factor
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.num_iterations = 0
        self.num_optimizer_steps = 0
        self.has_passed_gate = False
        self.floor = floor
        self.learning = Learning.of(algorithm.loss)
        self.last_metrics: dict[str, float] = {}
        context = Context(
            algorithm=algorithm,
            velocity=partial(velocity_in_updates, self),
            decode=partial(decode_with_graph, model),
            score=reward.score_with_graph,
            recomputes=partial(recomputes, self.transformer),
            reference=reference,
            tuning=tuning,
            latent_shape=model.latent_shape,
            member=self.scouting.member,
            seed=seed,
            gate_tolerance=gate_tolerance,
            teachers=teachers,
        )
        # Past LightningModule's registration: frozen modules stay out of parameters and state.
        self.__dict__.update(model=model, reward=reward, reference=reference)
        self.objective = OBJECTIVES[algorithm.loss.kind](context)
        ema.start(tuning.parameters())

    def configure_model(self) -> None:
        """Divide copies of weights as the strategy divides the weights, before the optimizer."""
        if shard(self, self.transformer, self.tuning.reference):
            self.load_weights(divide_copies(self.weights(), self.tuning.parameters()))

    def configure_optimizers(self) -> Optimizer:
        """Make the configured optimizer over the tuned weights, and keep its rates."""
        optimizer = at_once(self.make_optimizer(list(self.tuning.parameters().values())))
        self.rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def training_step(self, batch: PromptBatch, batch_index: int) -> None:
        """Run one iteration. Raises OutOfMemory, with the phase, where the device is too small."""
        clock = Clock(self.device)
        with memory_of_iteration(clock, self.plan):
            self.iterate(batch, clock)

    def iterate(self, batch: PromptBatch, clock: Clock) -> None:
        """Make rollouts, rewards, advantages and updates, and end a lap of the clock with each."""
        record = Record()
        with self.objective.at_behaviour():
            self.scouting.scout(self, batch, record, clock)
            updates = [
                sample_update(self, batch, number, micro_batches)
                for number, micro_batches in enumerate(self.plan.updates(self.global_rank))
            ]
        clock.lap("perf/rollout_seconds")
        assign_advantages(self, list(chain.from_iterable(updates)), record)
        clock.lap("perf/reward_seconds")
        if not self.has_passed_gate:
            self.objective.check_gate(updates[0][0])
            self.has_passed_gate = True
        set_learning_rate(self, batch.progress, record)
        self.algorithm.loss.begin(batch.progress)
        self.floor.take(self, batch, record)
        for _ in range(self.plan.inner_epochs):
            for update in updates:
                step_weights(self, update, record)
        self.objective.follow(self.num_optimizer_steps)
        clock.lap("perf/update_seconds")
        self.num_iterations = batch.iteration + 1
        values = record.means()
        values |= bound(values, len(self.objective.stochastic_steps(batch.iteration, prompt=0)))
        self.algorithm.loss.observe(values, self.plan.inner_epochs * len(updates))
        self.report(values | clock.report(self.scouting.num_drawn))

    @torch.no_grad()
    def sample(self, batch: PromptBatch, rows: range, stochastic: tuple[int, ...]) -> MicroBatch:
        """Draw the samples numbered `rows`, decode them and start scoring them."""
        conditioned, trajectory = draw(self, batch, rows, stochastic)
        prompts = [batch.prompts[self.plan.member(row)[0]] for row in rows]
        stages = score_completions(self, prompts, conditioned, trajectory)
        return MicroBatch(
            rows=rows,
            iteration=batch.iteration,
            prompts=prompts,
            conditioned=conditioned,
            trajectory=trajectory.on_host(),
            stages=stages,
            score=self.reward.submit(
                self.model.decode(trajectory.x0),
                prompts,
                first=rows.start,
                group_size=self.plan.group_size,
                are_trained_on=True,
            ),
            # These two are set once all scores are there.
            advantage=torch.zeros(len(rows), device=self.device),
            is_used=torch.ones(len(rows), dtype=torch.bool, device=self.device),
        )

    def velocity(
        self, x: Float[Tensor, "B *X"], sigma: float, conditioning: Conditioning
    ) -> Float[Tensor, "B *X"]:
        """Evaluate the current policy's velocity, at the rollout's guidance scale."""
        return self.model.velocity(x, sigma, conditioning, self.algorithm.guidance_scale)

    def report(self, values: Mapping[str, float]) -> None:
        """Log one iteration's metrics, and keep them for the run's record."""
        report_iteration(self, values)

    def on_fit_start(self) -> None:
        """Check the number of processes, and move what Lightning does not know of."""
        self.plan.require_processes(self.trainer.world_size)
        for component in (self.model, self.embed, self.reward, self.objective, self.ema):
            component.to(self.device)

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the sets of weights that a checkpoint needs, by what they are."""
        # A checkpoint calls trained weights "lora", whatever the tuning.
        sets: dict[str, Mapping[str, Tensor]] = {
            "lora": self.tuning.parameters(),
            "ema": self.ema.weights,
        }
        return sets | self.objective.weights()

    def load_weights(self, weights: Mapping[str, dict[str, Tensor]]) -> None:
        """Take back what `weights` gave."""
        load(self.tuning.parameters(), weights["lora"])
        self.ema.weights = weights["ema"]
        self.objective.load_weights(weights)

    def state(self) -> dict[str, Any]:
        """Return the counters that, with weights and optimizer, make up a checkpoint."""
        counters = {
            "num_iterations": self.num_iterations,
            "num_optimizer_steps": self.num_optimizer_steps,
            "learning": self.learning.state(),
        }
        return counters | {"loss": self.algorithm.loss.state(), "kl_floor": self.floor.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; earlier versions kept a loss's state beside the counters."""
        self.num_iterations = state["num_iterations"]
        self.num_optimizer_steps = state["num_optimizer_steps"]
        self.learning.load_state(state.get("learning"))
        self.algorithm.loss.load_state(state.get("loss", state))
        self.floor.load_state(state.get("kl_floor"))
