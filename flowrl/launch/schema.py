"""Types and bounds of the keys that no target of FlowRL's takes: those of the launch, and those of
other libraries.

Every other key has its type in the signature of what its node's `_target_` names. A key of the
configuration that has a type in neither place is refused, so a new key needs a line here or a
parameter there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from flowrl.values.bounds import (
    BelowOne,
    Betas,
    ClipLow,
    Count,
    Duration,
    FolderName,
    Guidance,
    LearningRate,
    Limit,
    Natural,
    NonNegative,
    Positive,
    Rate,
    Seed,
    Share,
    Shift,
    StepCount,
    StepNumber,
    Tag,
    Text,
    Threshold,
    Tokens,
    Told,
)


class Node:
    """Stands for a node with a `_target_`, whose keys are those of the target's signature."""


@dataclass
class Trained:
    """The steps of a rollout that may be stochastic: `count` of those from `low` to `high`."""

    count: StepCount
    low: StepNumber
    high: StepCount


@dataclass
class Rollout:
    """The keys that `Algorithm` and the steps take by interpolation."""

    num_steps: StepCount
    guidance_scale: Guidance
    training_guidance_scale: Guidance
    shared_initial_noise: bool
    trained: Trained
    credit: Literal["trajectory", "step"]


@dataclass
class Grid:
    """The keys that a schedule takes from the base model."""

    shift: Shift
    tokens: Tokens
    rule: Literal["linear", "empirical"]


@dataclass
class Trust:
    """Trust regions, of which a loss takes its own."""

    delta: Annotated[
        Threshold,
        Told("a number of at least 0; inf is no mask, and loss.delta=auto a budget of the KL"),
    ]
    clip: ClipLow
    cps_clip: ClipLow
    guard_clip: ClipLow
    awm_clip: ClipLow
    pair_clip: Positive
    forward_delta: Threshold
    above_floor: bool


@dataclass
class Teacher:
    """One teacher of a distilling loss. `families` null is all that no other teacher names,
    `guidance_scale` null that of rollouts.
    """

    lora: Text
    families: Annotated[Sequence[Text], MinLen(1)] | None = None
    guidance_scale: Guidance | None = None


@dataclass
class Checkpointing:
    """The options of `flowrl.callbacks.checkpoint.Checkpoint`."""

    every: Count
    keep: Count


@dataclass
class Viewing:
    """The options of `flowrl.callbacks.evaluate.Evaluate`."""

    every: Annotated[
        Natural, Told("a whole number of at least 0; 0 evaluates before and after training alone")
    ]
    num_shown: Count
    gold: Sequence[Text]


@dataclass
class Settings:
    """The whole configuration of a run, by its first words."""

    seed: Seed
    num_iterations: Count
    num_threads: Annotated[int, Ge(1), Le(1024)] | None
    matmul_precision: Literal["highest", "high", "medium"]
    resume: Text | None
    run_dir: Text | None
    name: FolderName | int
    tags: Sequence[Tag] | None
    condition: Text | None
    sweep: Text | None
    choices: Mapping[str, Text] | None
    objective: Text
    max_grad_norm: Annotated[
        Limit | Literal["inf", ".inf"], Told("above 0; for no clipping set it to .inf")
    ]
    max_missing: Share
    scorer_timeout: Duration | None
    frames: Node
    trust_folder: bool
    rehearsal: bool
    gate_tolerance: Share
    rollout: Rollout
    grid: Grid
    trust: Trust
    checkpoint: Checkpointing
    viewing: Viewing
    batch: Node
    algorithm: Node
    evaluation: Node
    likelihood: Node
    lora: Node
    teachers: Annotated[
        Mapping[str, Annotated[Teacher, Told("keys of a teacher, as {lora: FILE}")]] | None,
        Told("null or teachers by their names, as {NAME: {lora: FILE, families: [FAMILY]}}"),
    ]
    tuning: Node
    optimizer: Node
    ema: Node
    schedule: Node
    sampler: Node
    steps: Node
    trained: Node
    scouting: Node | None
    loss: Node
    penalty: Node
    regularizer: Node | None
    advantage: Node
    learning_rate: Node
    data: Node
    reward: Node
    backend: Node
    embeddings: Node
    model: Node
    trainer: Node
    logger: Mapping[str, Node]
    callbacks: Mapping[str, Node]


@dataclass(frozen=True)
class Foreign:
    """Another library's target: hints for its keys, before those of its signature, and keys that
    are refused.

    `refused` has the reason and the remedy by key. `needed` are keys that its signature must have,
    with the reason.
    """

    hints: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    needed: Mapping[str, str] = field(default_factory=dict)


_ITERATIONS = "an epoch is a run, and its length num_iterations"

FOREIGN = {
    "torch.optim.optimizer.Optimizer": Foreign(
        hints={
            "lr": LearningRate,
            "betas": Betas,
            "eps": Rate,
            "weight_decay": NonNegative,
            "momentum": BelowOne,
            "amsgrad": bool,
            "maximize": Annotated[Literal[False], Told("false: losses are minimised")],
            "foreach": bool | None,
            "capturable": bool,
            "fused": bool | None,
        },
        refused={"params": "the trained weights are given by the launch"},
        needed={
            "eps": (
                "update/grad_rms_over_eps compares gradients with it; take one of Adam's kind, "
                "such as AdamW"
            ),
        },
    ),
    "lightning.pytorch.trainer.trainer.Trainer": Foreign(
        hints={
            "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu", "xla", "hpu"],
            "devices": Count | Literal["auto", -1] | Sequence[Natural],
            "num_nodes": Annotated[int, Ge(1), Le(10_000)],
            "max_epochs": Annotated[Literal[1], Told(f"1: {_ITERATIONS}")],
            "log_every_n_steps": Count,
            "enable_checkpointing": Annotated[
                Literal[False], Told("false: checkpoint.every and checkpoint.keep save")
            ],
            "enable_model_summary": bool,
            "enable_progress_bar": bool,
            "use_distributed_sampler": Annotated[
                Literal[False], Told("false: another sampler would split the groups")
            ],
            "deterministic": bool | Literal["warn"] | None,
            "benchmark": bool | None,
            "detect_anomaly": bool,
            "profiler": Text | Node | None,
            "precision": Text | int | None,
            "default_root_dir": Text | None,
            "strategy": Text | Node,
        },
        refused={
            **dict.fromkeys(
                (
                    "max_steps",
                    "min_steps",
                    "min_epochs",
                    "limit_train_batches",
                    "overfit_batches",
                    "fast_dev_run",
                ),
                f"{_ITERATIONS}; set that",
            ),
            **dict.fromkeys(
                ("gradient_clip_val", "gradient_clip_algorithm"),
                "updates are not Lightning's, which would not clip them; set max_grad_norm",
            ),
            "accumulate_grad_batches": (
                "updates are not Lightning's, which would not accumulate; set batch.max_micro_batch"
            ),
            "callbacks": "callbacks stand under callbacks.NAME",
            "logger": "trackers stand under logger.NAME",
        },
    ),
    "lightning.pytorch.loggers.mlflow.MLFlowLogger": Foreign(
        hints={
            "experiment_name": Text,
            "run_name": Text | None,
            "tracking_uri": Text | None,
        }
    ),
    "lightning.pytorch.callbacks.progress.tqdm_progress.TQDMProgressBar": Foreign(
        hints={"refresh_rate": Natural, "process_position": Natural, "leave": bool}
    ),
}
"""By the dotted name of a class, for itself and what inherits from it."""
