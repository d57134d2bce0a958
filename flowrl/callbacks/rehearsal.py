"""The rehearsal of a run: one piece of each of its phases before anything long, with the seconds
and the memory that it takes.

What can fail for the machine or the model, such as memory, the gate or a kernel without a backward
pass, fails here and not after the first evaluation. Nothing is kept: no weight moves, and noise is
a function of what it is for, so that the run's numbers are bitwise those without a rehearsal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning import Callback, LightningModule, Trainer

from flowrl.evaluation.evaluator import Evaluator
from flowrl.models.backend import variants
from flowrl.objectives.gate import GateFailed, explain
from flowrl.objectives.micro_batch import MicroBatch
from flowrl.parallel.strategies import synchronised
from flowrl.training.credit import completions
from flowrl.training.memory import SMALLER_EVALUATION, memory_for, smaller_micro_batch
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import PromptBatch
from flowrl.training.sampling import Piece, draw
from flowrl.types import Prompt
from flowrl.values.bounds import Natural
from flowrl.values.units import GIB


@dataclass(frozen=True)
class Phase:
    """One piece of a phase: what was done, the seconds of it, and the peak of allocated GPU memory
    in GiB, None on a device that does not tell.
    """

    name: str
    what: str
    seconds: float
    peak_gib: float | None

    def describe(self) -> str:
        """Return a line for people."""
        peak = "" if self.peak_gib is None else f", {self.peak_gib:.2f} GiB at most"
        return f"{self.name:<11}{self.what}: {self.seconds:.2f} s{peak}"


@dataclass(frozen=True)
class Rehearsal:
    """The phases of a rehearsal, and the seconds that an iteration and an evaluation would take at
    their pace.
    """

    phases: Sequence[Phase]
    iteration_seconds: float
    evaluation_seconds: float

    def describe(self, num_iterations: int, num_evaluations: int) -> list[str]:
        """Return lines for people, the last of which is about so many iterations and evaluations
        in all.
        """
        whole = num_iterations * self.iteration_seconds + num_evaluations * self.evaluation_seconds
        return [
            *(phase.describe() for phase in self.phases),
            f"at this pace an iteration takes {duration(self.iteration_seconds)}, an evaluation "
            f"{duration(self.evaluation_seconds)}, and the run of {num_iterations} and "
            f"{num_evaluations} of them {duration(whole)}; first calls are the slowest",
        ]


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Rehearse(Callback):
    """The callback that does one piece of every phase of a new run before anything long, and says
    what the run will take.

    A resumed run, whose phases have all been seen to work, goes on at once. `every` is the number
    of iterations between evaluations, 0 for none between the first and the last.
    """

    def __init__(self, *, evaluator: Evaluator, every: Natural) -> None:
        self.evaluator = evaluator
        self.every = every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        if pl_module.num_iterations:
            return
        iterations = trainer.datamodule.iterations  # type: ignore[attr-defined]
        pl_module.print("rehearsing one piece of every phase")
        rehearsal = rehearse(pl_module, iterations[0], self.evaluator)
        num_iterations = len(iterations)
        between = (num_iterations - 1) // self.every if self.every else 0
        for line in rehearsal.describe(num_iterations, 2 + between):
            pl_module.print(f"  {line}")


def rehearse(policy: Policy, batch: PromptBatch, evaluator: Evaluator) -> Rehearsal:
    """Draw a micro-batch of candidates where there is scouting, roll out and replay one, pass the
    gate with it, evaluate one term forwards and backwards, and one pass over real images where an
    update has any, and draw and score one batch of the evaluation.

    All processes must call it. Raises GateFailed, and OutOfMemory with the phase's name.
    """
    plan = policy.plan
    updates = plan.updates(policy.global_rank)
    rows = updates[0][0]
    remedy = smaller_micro_batch(plan)
    phases: list[Phase] = []
    candidates = policy.scouting.pieces(policy, batch.iteration, policy.global_rank)
    if candidates:
        _scout(policy, batch, candidates[0], phases)
    with _timed(phases, "rollout", f"{len(rows)} samples"), memory_for("rollout", remedy):
        micro_batch = _roll_out(policy, batch, rows)
    policy.algorithm.loss.begin(batch.progress)
    with _timed(phases, "gate", f"{len(rows)} samples"), memory_for("gate", remedy):
        _pass_gate(policy, batch, micro_batch)
    num_terms = policy.objective.num_terms(micro_batch)
    with _timed(phases, "update", f"1 of {num_terms} terms"), memory_for("update", remedy):
        _evaluate_term(policy, micro_batch)
    regularising = _regularise(policy, phases)
    name, prompts = _batch_of(evaluator)
    what = f"{len(prompts)} images of {name}"
    with _timed(phases, "evaluation", what), memory_for("evaluation", SMALLER_EVALUATION):
        evaluator.draw_and_score(policy, prompts, 0)
    seconds = {phase.name: phase.seconds for phase in phases}
    num_micro_batches = sum(map(len, updates))
    per_micro_batch = seconds["rollout"] + plan.inner_epochs * num_terms * seconds["update"]
    scouting = len(candidates) * seconds.get("scouting", 0.0)
    num_images = evaluator.images_per_prompt * len(evaluator.prompts)
    per_image = seconds["evaluation"] / len(prompts) / plan.num_processes
    per_iteration = num_micro_batches * per_micro_batch + scouting + regularising
    return Rehearsal(phases, per_iteration, num_images * per_image)


@contextmanager
def _timed(phases: list[Phase], name: str, what: str) -> Iterator[None]:
    """Add the phase to the others once it is over."""
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    yield
    peak = None
    if is_cuda:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / GIB
    phases.append(Phase(name, what, time.perf_counter() - start, peak))


def _scout(policy: Policy, batch: PromptBatch, piece: Piece, phases: list[Phase]) -> None:
    """Draw a piece of the candidates, and choose nothing."""
    remedy = smaller_micro_batch(policy.plan)
    with (
        _timed(phases, "scouting", f"{len(piece[0])} candidates"),
        memory_for("scouting", remedy),
        policy.objective.at_behaviour(),
    ):
        policy.scouting.draw(policy, batch, piece)


@torch.no_grad()
def _roll_out(policy: Policy, batch: PromptBatch, rows: range) -> MicroBatch:
    """Draw a micro-batch as the first iteration does, and give it advantages of both signs."""
    stochastic = policy.objective.stochastic_steps(batch.iteration, policy.plan.member(rows[0])[0])
    with policy.objective.at_behaviour():
        conditioned, trajectory = draw(policy, batch, rows, stochastic)
        policy.model.decode(trajectory.x0)
        for _ in completions(policy, conditioned, trajectory):
            pass  # drawn and decoded, as an iteration would
    signs = 1.0 - 2.0 * (torch.arange(len(rows), device=policy.device) % 2)
    return MicroBatch(
        rows=rows,
        iteration=batch.iteration,
        prompts=[batch.prompts[policy.plan.member(row)[0]] for row in rows],
        conditioned=conditioned,
        trajectory=trajectory,
        score=Future(),
        advantage=signs,
        is_used=torch.ones(len(rows), dtype=torch.bool, device=policy.device),
    )


def _pass_gate(policy: Policy, batch: PromptBatch, micro_batch: MicroBatch) -> None:
    """Pass the gate; where it does not hold, say what the options of the backend have to do with
    it.
    """
    try:
        policy.objective.check_gate(micro_batch)
    except GateFailed as error:
        rows = micro_batch.rows
        raise explain(
            error,
            variants(policy.transformer),
            lambda: policy.objective.check_gate(_roll_out(policy, batch, rows)),
        ) from error
    policy.has_passed_gate = True


def _evaluate_term(policy: Policy, batch: MicroBatch) -> None:
    """Evaluate a term that has the most samples, the last of these, forwards and backwards, and
    drop the gradients.
    """
    objective = policy.objective
    step = policy.num_optimizer_steps
    counts = [objective.num_rows(batch, k, step) for k in range(objective.num_terms(batch))]
    if not any(counts):
        return
    index = max(range(len(counts)), key=lambda k: (counts[k], k))
    # As before an update's last term: gradients of processes do not meet.
    with synchronised(policy, is_last=False):
        output = objective.term(batch, index, step)
        policy.manual_backward(output.loss)
    _drop_gradients(policy)


def _regularise(policy: Policy, phases: list[Phase]) -> float:
    """Train on real images in one pass of an update, where an update does so, and drop the
    gradients; return the seconds that all passes of an iteration would take.
    """
    if policy.regularizer is None:
        return 0.0
    what = f"{len(policy.regularizer.chunks(policy)[0])} real images"
    remedy = smaller_micro_batch(policy.plan)
    with _timed(phases, "data", what), memory_for("data", remedy):
        num_passes = policy.regularizer.rehearse(policy)
    _drop_gradients(policy)
    return num_passes * phases[-1].seconds


def _drop_gradients(policy: Policy) -> None:
    for parameter in policy.tuning.parameters().values():
        parameter.grad = None


def _batch_of(evaluator: Evaluator) -> tuple[str, list[Prompt]]:
    """Return the first set's name, and the prompts of a batch of its images, whole ones."""
    name, prompts = next(iter(evaluator.sets.items()))
    count = max(1, evaluator.batch_size // evaluator.images_per_prompt)
    chosen = prompts[:count]
    return name, [prompt for prompt in chosen for _ in range(evaluator.images_per_prompt)]
