"""Evaluation before, during and after training, with pictures and numbers side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
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

from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.trackers import alert
from flowrl.errors import UserError
from flowrl.evaluation.evaluator import EvaluationResult, Evaluator
from flowrl.images import contact_sheet
from flowrl.parallel.sharding import is_divided
from flowrl.prompts.subsets import same_texts
from flowrl.statistics import fallen
from flowrl.training.metric_means import gather
from flowrl.training.policy import Policy
from flowrl.training.reporting import report_evaluation
from flowrl.types import RewardOutput
from flowrl.values.bounds import Count, Natural, Text

log = logging.getLogger(__name__)


class Evaluate(Callback):
    """Runs the evaluator at the start, every `every` iterations, and at the end; keeps the first
    images to compare.

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
            kept = load_file(self.before_path)
            self.first = (kept["images"], kept["scores"])
        except (OSError, SafetensorError, KeyError) as error:
            log.warning(
                "%s is damaged (%s): no pictures from before training will be shown, no alarms "
                "given; "
                "put the file back and resume to have them",
                *(self.before_path, error),
            )
            return
        self.watched = {name: kept[name] for name in ("reward", *self.gold) if name in kept}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        is_last = pl_module.num_iterations == len(trainer.datamodule.iterations)  # type: ignore[attr-defined]
        if is_last or (self.every and pl_module.num_iterations % self.every == 0):
            self.run(trainer, pl_module, "after" if is_last else "during")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run resumed with no iteration left, such as one whose last evaluation failed, is
        evaluated now.
        """
        assert isinstance(pl_module, Policy)
        is_last = pl_module.num_iterations == len(trainer.datamodule.iterations)  # type: ignore[attr-defined]
        if is_last and "after" not in self.record.evaluations:
            if not is_divided(pl_module.transformer):
                pl_module.to(trainer.strategy.root_device)  # Lightning has taken it off
            self.restore()
            self.run(trainer, pl_module, "after")

    def run(self, trainer: Trainer, policy: LightningModule, when: str) -> None:
        """Evaluate, log, draw."""
        assert isinstance(policy, Policy)
        result = self.evaluator.evaluate(policy)
        main = next(iter(self.evaluator.sets))
        watched = self.watch(result.scores[main])
        if not policy.num_iterations:
            self.watched = watched
            self.check_names(result.scores[main], getattr(policy.reward.reward, "monitors", ()))
        metrics = dict(result.metrics) | {
            f"eval/{main}/alarms": float(len(self.alarms(watched, trainer.loggers)))
        }
        report_evaluation(policy, metrics)
        headline = self.headline(result)
        self.record.add(when, metrics, headline)
        places = self.evaluator.spread_over(len(self.evaluator.sets[main]), self.num_shown)
        scores = result.scores[main]
        drawn = result.images[main]
        shown = [place * self.evaluator.images_per_prompt for place in places]  # one image a prompt
        # Of all processes; copies, since a view would keep its whole batch for the rest of the run.
        parts = gather({row: drawn[row].clone() for row in shown if row in drawn})
        found = {row: image for part in parts for row, image in part.items()}
        images = torch.stack([found[row] for row in shown])
        values = scores.parts.get(self.evaluator.headline, scores.values)[shown]
        values = torch.where(scores.is_valid[shown], values, torch.nan)
        if not trainer.is_global_zero:
            return
        if not policy.num_iterations:
            self.first = (images, values)
            self.before_path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.before_path.with_suffix(".partial")
            save_file(
                {"images": images.contiguous(), "scores": values.contiguous(), **watched}, partial
            )
            partial.replace(self.before_path)
        captions = [self.evaluator.sets[main][place].text for place in places]
        columns = [] if self.first is None else [("before", self.first[0], self.first[1].tolist())]
        if policy.num_iterations:
            columns.append((f"iteration {policy.num_iterations}", images, values.tolist()))
        sheet = contact_sheet.comparison(captions, columns, per_row=4)
        path = self.folder / "images" / f"{policy.num_iterations:06d}.png"
        contact_sheet.save(sheet, path)
        log_image(trainer, sheet, path, policy.num_iterations)
        numbers = ", ".join(
            f"{key} {value:.3g}" for key, value in headline.items() if isinstance(value, float)
        )
        policy.print(f"evaluation {when} (iteration {policy.num_iterations}): {numbers}; {path}")

    def watch(self, output: RewardOutput) -> dict[str, Tensor]:
        """The reward and the gold metrics of each sample, NaN where there is none; warns of one
        that is no part.
        """
        if unknown := [name for name in self.gold if name not in output.parts]:
            names = ", ".join(output.parts) or "none"
            log.warning(
                "viewing.gold=%s: no part of the reward, whose parts are: %s",
                ",".join(unknown),
                names,
            )
        found = [name for name in self.gold if name in output.parts]
        values = {"reward": torch.where(output.has_value, output.values, torch.nan)}
        return values | {
            name: torch.where(output.is_valid, output.parts[name], torch.nan) for name in found
        }

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
        """Gold metrics that fell while the reward rose; they are warned of, and trackers send an
        alert.
        """
        texts = same_texts(next(iter(self.evaluator.sets.values())))
        prompts = np.arange(len(watched["reward"])) // self.evaluator.images_per_prompt
        if not self.watched:
            return []
        both = [name for name in self.watched if name in watched]
        before, now = (
            {name: values[name].numpy() for name in both} for values in (self.watched, watched)
        )
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
        """The main set's scores at the top level, the other sets' under their names."""
        scores: dict[str, Any] = {}
        for i, name in enumerate(self.evaluator.sets):
            prefix = f"eval/{name}/"
            own = {
                key.removeprefix(prefix): value
                for key, value in result.metrics.items()
                if key.startswith(prefix)
            }
            plain = {
                key: value
                for key, value in own.items()
                if not key.startswith(("family/", "panel/"))
            }
            flat: dict[str, Any] = {
                key.removeprefix("part/"): value for key, value in plain.items()
            }
            flat["families"] = {
                key.removeprefix("family/"): v
                for key, v in own.items()
                if key.startswith("family/")
            }
            flat["panel"] = {
                key.removeprefix("panel/"): v for key, v in own.items() if key.startswith("panel/")
            }
            scores |= flat if i == 0 else {name: flat}
        return scores


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
