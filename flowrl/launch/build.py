"""Instantiating a configuration: the policy, its training prompts and its evaluator."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from flowrl.algorithm import Algorithm
from flowrl.errors import UserError
from flowrl.evaluation.evaluator import Evaluator
from flowrl.launch.checks import check_division, check_floor, check_optimizer, check_rules
from flowrl.launch.gradients import check_gradients, check_single
from flowrl.launch.interrupts import heed_swallowed
from flowrl.launch.networks import check_networks
from flowrl.launch.pictured import check_model_of_prompts
from flowrl.launch.regularizer import check_encoder, check_regularizer
from flowrl.launch.scores import check_prompts
from flowrl.launch.services import check_services
from flowrl.launch.start import check_start
from flowrl.launch.teachers import build_teachers, check_teachers, teacher_module
from flowrl.launch.validate import validate
from flowrl.models.grids import follow
from flowrl.objectives import check_method
from flowrl.parallel.strategies import norm_limit
from flowrl.rewards.protocol import asks_for_whole_groups
from flowrl.schedule import PipelineGrid
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.best_worst import Choice
from flowrl.training.data_regularizer import DataRegularizer
from flowrl.training.floor import Floor
from flowrl.training.graph import require_graph
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import PromptData
from flowrl.training.reference import ReferenceModule
from flowrl.training.reward import RewardModule
from flowrl.training.scouting import check_scouting
from flowrl.tuning.protocol import TuningRecipe
from flowrl.types import Prompt

DEFAULT_THREADS = torch.get_num_threads()
"""PyTorch's own choice: OMP_NUM_THREADS, or the physical cores."""


Examine = Callable[[Sequence[Prompt], Mapping[str, Sequence[Prompt]]], None]
"""A look at the prompts to train on and at those of each evaluation set."""


@dataclass(frozen=True)
class Prepared:
    """The parts of a run that are cheap to build, checked each and against one another."""

    algorithm: Algorithm
    plan: BatchPlan
    scouting: Choice | None
    recipe: TuningRecipe
    ema: Any
    data: PromptData
    evaluator: Evaluator
    max_grad_norm: float
    regularizer: DataRegularizer | None


def prepare(cfg: DictConfig, examine: Examine | None = None) -> Prepared:
    """Build what is cheap, so that a mistake is told before minutes of loading, and ask the servers
    that the reward needs.

    Raises UserError for a key, a value or a combination that is refused.
    """
    algorithm: Algorithm = instantiate(cfg.algorithm)
    check_method(algorithm)
    plan: BatchPlan = instantiate(cfg.batch)
    plan = plan.suited_to(algorithm.loss)
    # Runs from before there was the key draw what they train on.
    scouting: Choice | None = instantiate(cfg.get("scouting"))
    check_scouting(scouting, plan, algorithm)
    if algorithm.loss.needs_advantages:
        plan.require_groups()
    recipe: TuningRecipe = instantiate(cfg.tuning)
    ema = instantiate(cfg.ema)
    check_rules(cfg)
    check_floor(cfg, algorithm.loss)
    check_optimizer(cfg)
    data: PromptData = instantiate(cfg.data)
    evaluator: Evaluator = instantiate(cfg.evaluation)
    # Runs from before there was the key train on samples alone.
    regularizer: DataRegularizer | None = instantiate(cfg.get("regularizer"))
    check_regularizer(cfg, regularizer, plan)
    if examine is not None:
        examine(data.prompts, evaluator.sets)
    check_start(cfg, recipe)
    check_teachers(cfg, algorithm.loss, data.prompts)
    check_prompts(cfg, data.prompts)
    check_model_of_prompts(cfg, data.prompts + evaluator.prompts)
    max_grad_norm = norm_limit(cfg.max_grad_norm)
    num_updates = plan.updates_per_iteration * plan.inner_epochs
    algorithm.loss.check_updates(num_updates)
    check_services(cfg.reward)
    check_networks(cfg, recipe)
    check_gradients(cfg, algorithm.loss)
    return Prepared(
        algorithm, plan, scouting, recipe, ema, data, evaluator, max_grad_norm, regularizer
    )


def build(cfg: DictConfig, examine: Examine | None = None) -> tuple[Policy, PromptData, Evaluator]:
    """Build the policy, its training prompts and its evaluator; rules between components are
    checked before weights load.

    `examine` sees the prompts before that, too. Raises UserError for a key, a value or a
    combination that is refused.
    """
    # Leniently, since the run may be a resumed one of another version; a new run was looked at
    # more strictly before PyTorch was loaded.
    validate(cfg, allows_other_keys=True)
    num_threads = cfg.num_threads or DEFAULT_THREADS
    if num_threads != torch.get_num_threads():
        # The call slows attention on some processors, even with the number that holds already.
        torch.set_num_threads(num_threads)
    if not torch.cuda.is_available():
        # Lightning has PyTorch look for the driver's library whenever it asks for a GPU, as every
        # optimizer step does: milliseconds, where there is none to be found.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    # Runs from before there was the key computed with PyTorch's default.
    torch.set_float32_matmul_precision(cfg.get("matmul_precision", "highest"))
    prepared = prepare(cfg, examine)
    algorithm = prepared.algorithm
    # From here on weights are read, those of a scorer before those of the model.
    reward = RewardModule(
        reward=instantiate(cfg.reward),
        max_missing=cfg.max_missing,
        scorer_timeout=cfg.get("scorer_timeout"),
        frames=instantiate(cfg.get("frames")),
    )
    if asks_for_whole_groups(reward.reward):
        prepared.plan.require_whole_groups()
        if algorithm.credit == "step":
            raise UserError(
                f"rollout.credit=step scores images of unfinished samples, which "
                f"{type(reward.reward).__name__}, a scorer of whole groups, cannot tell from the "
                "finished ones: set rollout.credit=trajectory"
            )
    model = instantiate(cfg.model)
    check_encoder(prepared.regularizer, model)
    if isinstance(algorithm.schedule, PipelineGrid):
        follow(algorithm.schedule, model)
        check_method(algorithm)  # again, now that its sigmas are known
    prepared.recipe.check_layers(model.transformer)
    check_division(cfg, model.transformer)
    if algorithm.loss.kind == "direct":
        check_single(algorithm.loss, model.transformer)
        require_graph(model)
    # Before an adapter gives layers other names.
    teachers = build_teachers(cfg, model.transformer)
    tuning = prepared.recipe.attach(model.transformer, cfg.seed)
    reference = ReferenceModule(
        model=model, tuning=tuning, guidance_scale=algorithm.penalty.guidance_scale
    )
    policy = Policy(
        model=model,
        tuning=tuning,
        reward=reward,
        reference=reference,
        algorithm=algorithm,
        plan=prepared.plan,
        optimizer=instantiate(cfg.optimizer),
        rate_factor=instantiate(cfg.learning_rate),
        ema=prepared.ema,
        max_grad_norm=prepared.max_grad_norm,
        gate_tolerance=cfg.gate_tolerance,
        floor=Floor(is_added=bool(cfg.trust.get("above_floor", False))),
        seed=cfg.seed,
        scouting=prepared.scouting,
        teachers=teacher_module(cfg, teachers, model, tuning),
    )
    # After the tuning is attached, whose layers the backend prepares with the others.
    instantiate(cfg.backend).apply(model)
    # All prompts at once, so that text encoders need not stay in memory.
    data = prepared.data
    evaluator = prepared.evaluator
    every_prompt = data.prompts + evaluator.prompts
    policy.regularizer = prepared.regularizer
    if policy.regularizer is not None:
        every_prompt += policy.regularizer.prompts
    policy.embed = instantiate(cfg.embeddings)(model, every_prompt)
    # Loading imports much, and a library may have swallowed a Ctrl-C there.
    heed_swallowed()
    return policy, data, evaluator
