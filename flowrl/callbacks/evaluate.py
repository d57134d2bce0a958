"""Evaluation before, during and after training, with pictures and numbers side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl.callbacks.progress import Progress
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import is_at_end
from flowrl.callbacks.trackers import alert
from flowrl.errors import UserError
from flowrl.evaluation.evaluator import EvaluationResult, Evaluator
from flowrl.images import contact_sheet
from flowrl.parallel.collectives import gather
from flowrl.parallel.sharding import is_divided
from flowrl.prompts.subsets import same_texts
from flowrl.runs.files import grant_usual_mode, replacing
from flowrl.statistics import fallen
from flowrl.training.policy import Policy
from flowrl.training.reporting import report_evaluation
from flowrl.types import RewardOutput
from flowrl.values.bounds import Count, Natural, Text

log = logging.getLogger(__name__)


class Evaluate(Callback):
    """The callback that evaluates at the start, every `every` iterations, and at the end; it keeps
    the first images to compare.

    Writes `images/<iteration>.png` with the samples before and now, from the same noise, for
    `num_shown` prompts of the first set, taken as its prompts are. Warns when the reward has risen
    on that set since the start while one of `gold`, parts of the reward that are not trained on,
    has fallen.
    """

    def __init__(
        self,
        *,
        evaluator: Evaluator,
        record: RunRecord,
        folder: str,
        every: Natural,
        num_shown: Count,
        gold: Sequence[Text],
    ) -> None:
        self.evaluator = evaluator
        self.record = record
        self.folder = Path(folder)
        self.every = every
        self.num_shown = num_shown
        self.gold = tuple(gold)
        self.first: tuple[Tensor, Tensor] | None = None
        self.watched: dict[str, Tensor] = {}

    @property
    def before_path(self) -> Path:
        return self.folder / "images" / "before.safetensors"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        for name in self.evaluator.sets:
            pl_module.print(f"evaluation prompts, {name}: {self.evaluator.told(name)}")
        if pl_module.num_iterations:
            self.restore()
        else:
            pl_module.print("evaluating the model as it is")
            self.run(trainer, pl_module, "before")

    def restore(self) -> None:
        """Take back what was drawn before training; without it, later pictures and alarms have
        nothing beside them.
        """
        if not self.before_path.is_file():
            log.warning(
                "%s is gone: no pictures from before training will be shown, no alarms given",
                self.before_path,
            )
            return
        try:
            before = load_file(self.before_path)
            self.first = (before["images"], before["scores"])
        except (OSError, SafetensorError, KeyError) as error:
            log.warning(
                "%s is damaged (%s): no pictures from before training will be shown, no alarms "
                "given; put the file back and resume to have them",
                *(self.before_path, error),
            )
            return
        self.watched = {name: before[name] for name in ("reward", *self.gold) if name in before}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        is_last = is_at_end(trainer, pl_module)
        if is_last or (self.every and pl_module.num_iterations % self.every == 0):
            self.run(trainer, pl_module, "after" if is_last else "during")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a run that was resumed with no iteration left, such as one whose last evaluation
        failed.
        """
        assert isinstance(pl_module, Policy)
        is_last = is_at_end(trainer, pl_module)
        if is_last and "after" not in self.record.evaluations:
            if not is_divided(pl_module.transformer):
                pl_module.to(trainer.strategy.root_device)  # Lightning has taken it off
            self.restore()
            self.run(trainer, pl_module, "after")

    def run(self, trainer: Trainer, policy: LightningModule, when: str) -> None:
        """Evaluate, log, draw; all processes call it."""
        assert isinstance(policy, Policy)
        result = self.evaluate(trainer, policy)
        main = next(iter(self.evaluator.sets))
        scores = result.scores[main]
        watched = self.watch(scores)
        if not policy.num_iterations:
            self.watched = watched
            self.check_names(scores, getattr(policy.reward.reward, "monitors", ()))
        metrics = dict(result.metrics) | {
            f"eval/{main}/alarms": float(len(self.alarms(watched, trainer.loggers)))
        }
        report_evaluation(policy, metrics)
        headline = self.headline(result)
        self.record.add(when, metrics, headline)
        places = self.evaluator.spread_over(len(self.evaluator.sets[main]), self.num_shown)
        images, values = self.shown(scores, result.images[main], places)
        if not trainer.is_global_zero:
            return
        if not policy.num_iterations:
            self.first = (images, values)
            self.before_path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"images": images.contiguous(), "scores": values.contiguous(), **watched}
            with replacing(self.before_path) as partial:
                save_file(tensors, partial)
                grant_usual_mode(partial)
        captions = [self.evaluator.sets[main][place].text for place in places]
        path = self.draw(trainer, policy.num_iterations, captions, images, values)
        numbers = ", ".join(
            f"{key} {value:.3g}" for key, value in headline.items() if isinstance(value, float)
        )
        policy.print(f"evaluation {when} (iteration {policy.num_iterations}): {numbers}; {path}")

    def evaluate(self, trainer: Trainer, policy: Policy) -> EvaluationResult:
        """Evaluate, and show in place of the progress bar how far that is."""
        bar = trainer.progress_bar_callback
        if not isinstance(bar, Progress):
            return self.evaluator.evaluate(policy)
        with bar.in_words() as tell:
            return self.evaluator.evaluate(policy, lambda text: tell(f"evaluating {text}"))

    def shown(
        self, scores: RewardOutput, images: Mapping[int, Tensor], places: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the first image of each prompt at `places`, gathered from all processes, and its
        headline score, NaN where it has none.
        """
        rows = [place * self.evaluator.images_per_prompt for place in places]
        # Copies, since a view would keep its whole batch for the rest of the run.
        shares = gather({row: images[row].clone() for row in rows if row in images})
        gathered: dict[int, Tensor] = {}
        for share in shares:
            gathered |= share
        values = scores.parts.get(self.evaluator.headline, scores.values)[rows]
        values = torch.where(scores.is_valid[rows], values, torch.nan)
        return torch.stack([gathered[row] for row in rows]), values

    def draw(
        self,
        trainer: Trainer,
        num_iterations: int,
        captions: Sequence[str],
        images: Tensor,
        values: Tensor,
    ) -> Path:
        """Draw the images beside those from before training, send them to the trackers, and return
        the picture's path.
        """
        columns = []
        if self.first is not None:
            columns.append(("before", self.first[0], self.first[1].tolist()))
        if num_iterations:
            columns.append((f"iteration {num_iterations}", images, values.tolist()))
        sheet = contact_sheet.comparison(captions, columns, per_row=4)
        path = self.folder / "images" / f"{num_iterations:06d}.png"
        contact_sheet.save(sheet, path)
        log_image(trainer, sheet, path, num_iterations)
        return path

    def watch(self, output: RewardOutput) -> dict[str, Tensor]:
        """Return the reward and the gold metrics of each sample, NaN where there is none; warn of
        one that is no part.
        """
        if unknown := [name for name in self.gold if name not in output.parts]:
            names = ", ".join(output.parts) or "none"
            log.warning(
                "viewing.gold=%s: no part of the reward, whose parts are: %s",
                ",".join(unknown),
                names,
            )
        watched = {"reward": torch.where(output.has_value, output.values, torch.nan)}
        for name in self.gold:
            if name in output.parts:
                watched[name] = torch.where(output.is_valid, output.parts[name], torch.nan)
        return watched

    def check_names(self, output: RewardOutput, monitors: Iterable[str]) -> None:
        """Refuse a headline or gold metric that the reward does not have, before anything is
        trained.

        A mixture's monitor that failed leaves its parts out, so that nothing can be said of them
        then.
        """
        if any(name not in output.parts for name in monitors):
            return
        asked = [("evaluation.headline", self.evaluator.headline, {"reward", *output.parts})]
        asked += [("viewing.gold", name, set(output.parts)) for name in self.gold]
        for key, name, known in asked:
            if name not in known:
                words = ", ".join(sorted(known)) or "none"
                raise UserError(f"{key}={name}: the reward has no such score; it has {words}")

    def alarms(self, watched: dict[str, Tensor], loggers: Sequence[Logger]) -> list[str]:
        """List gold metrics that fell while the reward rose, warn of them, and have trackers send
        an alert.
        """
        texts = same_texts(next(iter(self.evaluator.sets.values())))
        prompts = np.arange(len(watched["reward"])) // self.evaluator.images_per_prompt
        if not self.watched:
            return []
        names = [name for name in self.watched if name in watched]
        before = {name: self.watched[name].numpy() for name in names}
        now = {name: watched[name].numpy() for name in names}
        fell = fallen(before, now, prompts, texts)
        if fell:
            text = (
                f"the reward rose and {', '.join(fell)} fell: the reward may be being cheated; "
                "look at images/"
            )
            log.warning(text)
            alert(loggers, "Reward up, gold down", text, level="WARN")
        return fell

    def headline(self, result: EvaluationResult) -> dict[str, Any]:
        """Return the main set's scores at the top level, the other sets' under their names."""
        scores: dict[str, Any] = {}
        for i, name in enumerate(self.evaluator.sets):
            metrics = _below(result.metrics, f"eval/{name}/")
            of_set: dict[str, Any] = {
                key.removeprefix("part/"): value
                for key, value in metrics.items()
                if not key.startswith(("family/", "panel/"))
            }
            of_set["families"] = _below(metrics, "family/")
            of_set["panel"] = _below(metrics, "panel/")
            scores |= of_set if i == 0 else {name: of_set}
        return scores


def _below(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the metrics whose names begin with `prefix`, without it."""
    return {
        key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)
    }


def log_image(trainer: Trainer, sheet: Image.Image, path: Path, iteration: int) -> None:
    """Send one composed grid to the trackers that take images."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("images", [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
            logger.experiment.add_image(
                "images", pixels.view(sheet.height, sheet.width, 3), iteration, dataformats="HWC"
            )
