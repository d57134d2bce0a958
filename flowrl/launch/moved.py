"""The places where the targets of older runs' configurations stand today: a run's folder names them
as they were when it began.
"""

from __future__ import annotations

import copy
from typing import Any

MOVED = {
    "flowrl.background": "flowrl.parallel.background",
    "flowrl.batch_plan": "flowrl.training.batch_plan",
    "flowrl.data": "flowrl.training.prompt_data",
    "flowrl.ema": "flowrl.training.ema",
    "flowrl.evaluation": "flowrl.evaluation.evaluator",
    "flowrl.learning_rate": "flowrl.training.learning_rate",
    "flowrl.models.full": "flowrl.tuning.full",
    "flowrl.models.lora": "flowrl.tuning.lora",
    "flowrl.modules.parallel": "flowrl.parallel.strategies",
    "flowrl.trackers": "flowrl.callbacks.trackers",
}
"""Modules that held targets, and the modules in which the same names stand now."""


CLASSES = {
    "flowrl.losses.grpo.grpo": "flowrl.losses.grpo.GRPO",
    "flowrl.losses.guard.guard": "flowrl.losses.guard.Guard",
}
"""Functions that were to be called later, with `_partial_`, and the classes that they became."""


ADDED: dict[str, dict[str, Any]] = {
    "flowrl.algorithm.Algorithm": {
        "trained": {"_target_": "flowrl.samplers.trained.AllStochastic"},
        "credit": "trajectory",
        "training_guidance_scale": None,
    },
    "flowrl.models.flux1.Flux1": {"channels_last": False},
    "flowrl.models.flux2.Flux2Dev": {"channels_last": False},
    "flowrl.models.flux2.Flux2Klein": {"channels_last": False},
    "flowrl.samplers.steps.Window": {"stride": None, "rolls_back": True, "shrinks": False},
}
"""Keys that targets have been given since, with the values by which older runs go on as before."""


def move(node: Any) -> Any:
    """Copy a plain configuration, each target that stood elsewhere by its name of today, and with
    the keys that it has been given since.
    """
    if isinstance(node, list):
        return [move(item) for item in node]
    if not isinstance(node, dict):
        return node
    moved = {key: move(value) for key, value in node.items()}
    target = moved.get("_target_")
    if isinstance(target, str):
        moved["_target_"] = current_name(target)
        if target in CLASSES:
            moved.pop("_partial_", None)
        moved = copy.deepcopy(ADDED.get(moved["_target_"], {})) | moved
    return moved


def current_name(target: str) -> str:
    """Return the dotted name under which a target is found today; one that has not moved keeps
    its own.
    """
    if target in CLASSES:
        return CLASSES[target]
    module, _, name = target.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else target
