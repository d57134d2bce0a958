"""A derived model is checked against its stock pipeline before its weights are trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from flowrl.evaluation.evaluator import Evaluator
from flowrl.models.derived.adapter import Derived
from flowrl.runs.files import PARITY, read_object, write_whole
from flowrl.training.parity import check_policy, record_of, scales_of
from flowrl.training.policy import Policy


class ParityCheck(Callback):
    """The callback that checks a derived model once in a run, and keeps what it measured.

    It runs where training runs, since a model of billions of parameters is drawn with on no other
    device. A resumed run whose record is of the same pipeline, call and dtype is not checked again.
    Raises ParityError where the pipeline does otherwise under FlowRL than by itself. Models with an
    adapter of their own are held to stock pipelines by FlowRL's own tests.
    """

    def __init__(self, *, evaluator: Evaluator, folder: str) -> None:
        self.evaluator = evaluator
        self.path = Path(folder) / PARITY

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        model = pl_module.model
        if not isinstance(model, Derived):
            return
        scales = scales_of(pl_module.algorithm, self.evaluator.guidance_scale)
        if self._is_known(model, scales):
            return
        pl_module.print(f"checking {model.kind.__name__} against itself")
        parities = check_policy(
            pl_module,
            evaluation_scale=self.evaluator.guidance_scale,
            prompts=self.evaluator.prompts,
        )
        for parity in parities:
            pl_module.print(f"  {parity.describe()}")
        if trainer.is_global_zero:
            write_whole(self.path, json.dumps(record_of(parities, model), indent=2) + "\n")

    def _is_known(self, model: Derived, scales: Sequence[float]) -> bool:
        """Tell whether this run has checked the same model before, at these guidance scales."""
        if not self.path.is_file():
            return False
        record: dict[str, Any] = read_object(self.path, "delete it to check the model again")
        if record.get("model") != model.identity or record.get("dtype") != model.dtype:
            return False
        known = {check.get("guidance_scale") for check in record.get("checks", [])}
        return known.issuperset(scales)
