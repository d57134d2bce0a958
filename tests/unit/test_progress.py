"""The progress bar counts the run's iterations."""

import pytest
import torch
from lightning import Callback, LightningModule, Trainer

from flowrl.callbacks import progress
from flowrl.callbacks.progress import Progress, in_lines
from flowrl.training.prompt_data import PromptData
from flowrl.types import Prompt


class Still(LightningModule):
    """Trains nothing."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.last_metrics = {}

    def training_step(self, batch, batch_idx):
        self.last_metrics = {"reward/mean": float(batch.iteration), "trust/delta": 1e-3}

    def configure_optimizers(self):
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])


class Evaluates(Callback):
    """Draws before training, as an evaluation does."""

    def on_train_start(self, trainer, pl_module):
        with trainer.progress_bar_callback.in_words() as tell:
            for count in (0, 8):
                tell(f"evaluating held_in: {count} of 8 images")


def fit():
    """Three of five iterations are left."""
    data = PromptData(
        prompts=[Prompt("a"), Prompt("b")], prompts_per_iteration=1, num_iterations=5, seed=0
    )
    data.start_iteration = 2
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[Progress(refresh_rate=1), Evaluates()], **quiet
    )
    trainer.fit(Still(), datamodule=data)


EVERY_LINE = [
    "evaluating held_in: 0 of 8 images",
    "evaluating held_in: 8 of 8 images",
    "iteration 3 of 5: reward=2",
    "iteration 4 of 5: reward=3",
    "iteration 5 of 5: reward=4",
]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, EVERY_LINE), (3600, [EVERY_LINE[i] for i in (0, 2, 4)])]
)
def test_a_file_gets_lines(seconds, expected, monkeypatch, capsys):
    """The first iteration and the last always.

    Mutation: draw the bar, with its carriage returns, or print every line however fast they come.
    """
    monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
    fit()
    out = capsys.readouterr().out
    assert "\r" not in out
    assert [line for line in out.splitlines() if line.startswith(("eval", "iter"))] == expected


def test_a_resumed_run_goes_on_where_it_stopped(capsys, monkeypatch):
    """Three of five are left; an evaluation stands in the bar's place while it draws.

    Mutation: count from zero, or to what is left; show the tracker's run id, or a bar that stands
    still.
    """
    monkeypatch.setattr(progress, "is_terminal", lambda: True)
    fit()
    shown = "".join(capsys.readouterr())
    assert all(f" {n}/5 " in shown for n in (3, 4, 5)) and "5/5" in shown and "reward=4" in shown
    lines = [line.strip() for line in shown.split("\r")]
    first = lines.index("evaluating held_in: 0 of 8 images")
    assert lines[first + 1] == "evaluating held_in: 8 of 8 images"
    assert not any("evaluating" in line for line in lines[first + 2 :])
    assert "/?" not in "".join(lines[2:]) and "2/5" in lines[2]  # once Lightning has made the bar
    assert " 1/" not in shown and "/3 " not in shown and "v_num" not in shown


def test_a_list_is_divided_between_its_items_alone():
    """Mutation: break at any space, or leave a line that is a column too long."""
    assert in_lines(["reward 0.5", "kl 1"]) == "  reward 0.5, kl 1"
    # Two of indent, 25 and a comma, a space and 51: exactly 80.
    assert in_lines(["a" * 25, "b" * 51]) == f"  {'a' * 25}, {'b' * 51}"
    assert in_lines(["a" * 25, "b c " + "d" * 48]) == f"  {'a' * 25},\n  b c {'d' * 48}"
    assert in_lines(["a" * 90, "b"]) == f"  {'a' * 90},\n  b"
