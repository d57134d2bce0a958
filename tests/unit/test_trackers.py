"""Which events reach the trackers as alerts."""

from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image

from flowrl.callbacks.evaluate import Evaluate
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.trackers import log_clips
from flowrl.evaluation.evaluator import Evaluator
from flowrl.images.clips import save_moving
from flowrl.objectives.gate import GateFailed
from flowrl.training.reward import TooManyMissingRewards
from flowrl.types import Prompt


class Alerts(WandbLogger):
    """A W&B logger that only keeps what it is sent."""

    def __init__(self):
        self.sent = []

    @property
    def experiment(self):
        return SimpleNamespace(alert=lambda **alert: self.sent.append(alert))

    def log_metrics(self, metrics, step=None):
        self.sent.append(metrics)


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


def test_clips_go_to_wandb_as_the_file_they_are(tmp_path):
    """W&B takes a GIF without encoding it; trackers that would encode it get nothing.

    Mutation: send frames as numbers, which asks for a package of W&B's own.
    """
    path = tmp_path / "000002.gif"
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 90, 200)]
    save_moving(frames, path, "GIF")
    logger = Alerts()
    log_clips([logger, CSVLogger(tmp_path)], path)
    [(key, [video])] = logger.sent[0].items()
    assert key == "clips" and (video._format, video._path) == ("gif", str(path))
