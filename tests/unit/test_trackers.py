"""Which events reach the trackers as alerts."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from flowrl.callbacks.evaluate import Evaluate
from flowrl.callbacks.record import RunRecord
from flowrl.evaluation.evaluator import Evaluator
from flowrl.objectives.gate import GateFailed
from flowrl.training.reward import TooManyMissingRewards
from flowrl.types import Prompt


class Alerts(WandbLogger):
    """A W&B logger whose run only keeps the alerts."""

    def __init__(self):
        self.sent = []

    @property
    def experiment(self):
        return SimpleNamespace(alert=lambda **alert: self.sent.append(alert))


@pytest.mark.parametrize("error", [GateFailed("drift", 1.0), TooManyMissingRewards("half of them")])
def test_errors_that_end_a_run_are_alerts(error, tmp_path):
    """A user's interrupt is none. Mutation: alert on every exception, or on none."""
    alerts, record = Alerts(), RunRecord(folder=str(tmp_path))
    quiet = dict.fromkeys(
        ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(accelerator="cpu", logger=alerts, **quiet)
    record.on_exception(trainer, LightningModule(), KeyboardInterrupt())
    record.on_exception(trainer, LightningModule(), error)
    assert alerts.sent == [{"title": type(error).__name__, "text": str(error), "level": "ERROR"}]


def test_reward_up_and_gold_down_is_an_alert(tmp_path):
    """Mutation: only write it to the log, or alert at the first evaluation."""
    evaluator, record = object.__new__(Evaluator), RunRecord(folder=str(tmp_path))
    evaluator.images_per_prompt = 1
    evaluator.sets = {"own": [Prompt(str(i)) for i in range(50)]}
    viewer = Evaluate(
        evaluator=evaluator,
        record=record,
        folder=str(tmp_path),
        every=1,
        num_shown=1,
        gold=["clean_objects"],
    )
    alerts, values = Alerts(), torch.linspace(0, 1, 50)
    viewer.watched = {"reward": values, "clean_objects": values}
    assert viewer.alarms(viewer.watched, [alerts]) == []
    assert alerts.sent == []
    assert viewer.alarms({"reward": values + 1, "clean_objects": values - 1}, [alerts]) == [
        "clean_objects"
    ]
    (alert,) = alerts.sent
    assert alert["level"] == "WARN" and "clean_objects fell" in alert["text"]
