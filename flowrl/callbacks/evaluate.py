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

from flowrl.callbacks.progress import Progress, in_lines
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import is_at_end
from flowrl.callbacks.trackers import alert, log_clips
from flowrl.errors import UserError
from flowrl.evaluation.evaluator import EvaluationResult, Evaluator
from flowrl.images import contact_sheet
from flowrl.parallel.collectives import gather_to_first
from flowrl.parallel.sharding import is_divided
from flowrl.prompts.pictures import sources_of
from flowrl.prompts.subsets import same_texts
from flowrl.runs.files import grant_usual_mode, replacing
from flowrl.statistics import fallen
from flowrl.training.memory import SMALLER_EVALUATION, memory_for
from flowrl.training.policy import Policy
from flowrl.training.reporting import report_evaluation
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Count, Natural, Text
from flowrl.values.named import below

log = logging.getLogger(__name__)

PER_ROW = 4
"""Samples that stand beside each other in a run's pictures."""


class Evaluate(Callback):
    """The callback that evaluates at the start, every `every` iterations, and at the end; it keeps
    the first images to compare.

    Writes `images/<iteration>.png` with the samples before and now, from the same noise, for
    `num_shown` prompts of the first set, taken as its prompts are; of clips, strips of their
    frames, and beside it a `.gif` in which they move. Warns when the reward has risen
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
        """The file that keeps the images and scores from before training, for a resumed run."""
        return self.folder / "images" / "before.safetensors"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Policy)
        for name in self.evaluator.sets:
            # A line for what is drawn, and one for what repeats.
            told = self.evaluator.describe(name).replace("; ", "\n  ")
            pl_module.print(f"evaluation prompts, {name}: {told}")
        if pl_module.num_iterations:
            self.restore()
        else:
            pl_module.print("evaluating the model as it is")
            self.run(trainer, pl_module, "before")

    def restore(self) -> None:
        """Take back what was drawn before training; without it, later pictures and alarms have
        nothing beside them.
        """
        # Neither is a reason to stop the run: it trains as it would have.
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
                self.before_path,
                error,
            )
            return
        # A gold metric that came with an override at resumption has no values from before.
        names = ("reward", *self.gold)
        self.watched = {name: before[name] for name in names if name in before}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Policy)
        if is_at_end(trainer, pl_module):
            self.run(trainer, pl_module, "after")
        elif self.every and pl_module.num_iterations % self.every == 0:
            self.run(trainer, pl_module, "during")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a run that was resumed with no iteration left, such as one whose last evaluation
        failed.
        """
        assert isinstance(pl_module, Policy)
        is_last = is_at_end(trainer, pl_module)
        if is_last and "after" not in self.record.evaluations:
            # Lightning has taken the policy off its device by now, but not divided weights.
            if not is_divided(pl_module.transformer):
                pl_module.to(trainer.strategy.root_device)
            self.restore()
            self.run(trainer, pl_module, "after")

    def run(self, trainer: Trainer, policy: LightningModule, when: str) -> None:
        """Evaluate, log, draw; all processes call it.

        `when` is before, during or after, under which the run's record keeps the scores. Raises
        UserError before training for a score that the reward does not have.
        """
        assert isinstance(policy, Policy)
        is_before = not policy.num_iterations
        result = self.evaluate(trainer, policy)
        # Pictures, alarms and the names of scores are of the first set.
        main = next(iter(self.evaluator.sets))
        prompts = self.evaluator.sets[main]
        scores = result.scores[main]
        watched = self.watch(scores)
        if is_before:
            self.watched = watched
            self.check_names(scores, getattr(policy.reward.reward, "monitors", ()))
        alarms = self.alarms(watched, trainer.loggers)
        metrics = dict(result.metrics)
        metrics[f"eval/{main}/alarms"] = float(len(alarms))
        report_evaluation(policy, metrics)
        headline = self.headline(result)
        self.record.add(when, metrics, headline)
        places = self.places(main)
        shown = self.shown(scores, result.images[main], places)
        # Only now, since `shown` gathers the images of all processes.
        if shown is None:
            return
        images, values = shown
        if is_before:
            self.first = (images, values)
            self.keep_first(images, values, watched)
        path = self.draw(
            trainer, policy.num_iterations, [prompts[place] for place in places], images, values
        )
        numbers = []
        for key, value in headline.items():
            # The other sets, families and panels are dictionaries, too long for a line.
            if isinstance(value, float):
                numbers.append(f"{key} {value:.3g}")
        place = path.relative_to(self.folder)
        about = f"evaluation {when} (iteration {policy.num_iterations}), {place}:"
        policy.print(f"{about}\n{in_lines(numbers)}")

    def keep_first(self, images: Tensor, values: Tensor, watched: Mapping[str, Tensor]) -> None:
        """Write the images and scores from before training, whole or not at all."""
        # safetensors refuses tensors that are not contiguous.
        tensors = {"images": images.contiguous(), "scores": values.contiguous(), **watched}
        self.before_path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.before_path) as partial:
            save_file(tensors, partial)
            grant_usual_mode(partial)

    def evaluate(self, trainer: Trainer, policy: Policy) -> EvaluationResult:
        """Evaluate, and show in place of the progress bar how far that is; the images that will be
        shown are kept.

        Raises OutOfMemory where the device is too small for a batch.
        """
        main = next(iter(self.evaluator.sets))
        kept = {main: self.rows_shown(self.places(main))}
        bar = trainer.progress_bar_callback
        if not isinstance(bar, Progress):
            with memory_for("evaluation", SMALLER_EVALUATION):
                return self.evaluator.evaluate(policy, kept=kept)
        with bar.in_words() as tell, memory_for("evaluation", SMALLER_EVALUATION):
            return self.evaluator.evaluate(policy, lambda text: tell(f"evaluating {text}"), kept)

    def places(self, name: str) -> list[int]:
        """Return the places of the prompts of a set whose images are shown."""
        return self.evaluator.places_of(len(self.evaluator.sets[name]), self.num_shown)

    def rows_shown(self, places: Sequence[int]) -> list[int]:
        """Return the rows of the first image of each prompt."""
        return [place * self.evaluator.images_per_prompt for place in places]

    def shown(
        self, scores: RewardOutput, images: Mapping[int, Tensor], places: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the first image of each prompt at `places`, gathered from all processes, and its
        headline score, NaN where it has none; None in other processes than the first.

        `scores` are those of the whole set, `images` those that this process drew, by their row.
        All processes call it.
        """
        rows = self.rows_shown(places)
        images_here = {row: images[row] for row in rows if row in images}
        shares = gather_to_first(images_here)
        if shares is None:
            return None
        gathered: dict[int, Tensor] = {}
        for share in shares:
            gathered |= share
        headline = scores.parts.get(self.evaluator.headline, scores.values)
        values = torch.where(scores.is_valid[rows], headline[rows], torch.nan)
        shown_images = torch.stack([gathered[row] for row in rows])
        return shown_images, values

    def draw(
        self,
        trainer: Trainer,
        num_iterations: int,
        prompts: Sequence[Prompt],
        images: Tensor,
        values: Tensor,
    ) -> Path:
        """Draw the images beside those from before training, and beside the pictures that were
        edited, send them to the trackers, and return the picture's path.
        """
        columns = []
        if self.first is not None:
            first_images, first_values = self.first
            columns.append(("before", first_images, first_values.tolist()))
        # Before training the images are themselves the first ones.
        if num_iterations:
            columns.append((f"iteration {num_iterations}", images, values.tolist()))
        captions = [prompt.text for prompt in prompts]
        sources = sources_of(prompts)
        sheet = contact_sheet.comparison(captions, columns, per_row=PER_ROW, sources=sources)
        path = self.folder / "images" / f"{num_iterations:06d}.png"
        contact_sheet.save(sheet, path)
        log_image(trainer, sheet, path, num_iterations)
        if images.ndim == 5:
            sheets = contact_sheet.moving(captions, columns, per_row=PER_ROW)
            moving_path = path.with_suffix(".gif")
            contact_sheet.save_sheets(sheets, moving_path)
            log_clips(trainer.loggers, moving_path)
        return path

    def watch(self, output: RewardOutput) -> dict[str, Tensor]:
        """Return the reward and the gold metrics of each sample, NaN where there is none; warn of
        one that is no part.
        """
        watched = {"reward": torch.where(output.has_value, output.values, torch.nan)}
        unknown = []
        for name in self.gold:
            if name in output.parts:
                watched[name] = torch.where(output.is_valid, output.parts[name], torch.nan)
            else:
                unknown.append(name)
        if unknown:
            names = ", ".join(output.parts) or "none"
            log.warning(
                "viewing.gold=%s: no part of the reward, whose parts are: %s",
                ",".join(unknown),
                names,
            )
        return watched

    def check_names(self, output: RewardOutput, monitors: Iterable[str]) -> None:
        """Refuse a headline or gold metric that the reward does not have, before anything is
        trained.

        A mixture's monitor that failed leaves its parts out, so that nothing can be said of them
        then. Raises UserError that names the key.
        """
        if any(name not in output.parts for name in monitors):
            return
        parts = set(output.parts)
        asked = [("evaluation.headline", self.evaluator.headline, {"reward", *parts})]
        asked += [("viewing.gold", name, parts) for name in self.gold]
        for key, name, known in asked:
            if name not in known:
                words = ", ".join(sorted(known)) or "none"
                raise UserError(f"{key}={name}: the reward has no such score; it has {words}")

    def alarms(self, watched: dict[str, Tensor], loggers: Sequence[Logger]) -> list[str]:
        """List gold metrics that fell while the reward rose, warn of them, and have trackers send
        an alert; none where nothing from before training is known.
        """
        if not self.watched:
            return []
        # Images of one prompt, and prompts of one text, are not independent evidence.
        first_set = next(iter(self.evaluator.sets.values()))
        texts = same_texts(first_set)
        prompts = np.arange(len(watched["reward"])) // self.evaluator.images_per_prompt
        names = [name for name in self.watched if name in watched]
        before = {name: self.watched[name].numpy() for name in names}
        now = {name: watched[name].numpy() for name in names}
        fell = fallen(before, now, prompts, texts)
        if fell:
            metrics = ", ".join(fell)
            text = (
                f"the reward rose and {metrics} fell: the reward may be being cheated; "
                "look at images/"
            )
            log.warning(text)
            alert(loggers, "Reward up, gold down", text, level="WARN")
        return fell

    def headline(self, result: EvaluationResult) -> dict[str, Any]:
        """Return the main set's scores at the top level, the other sets' under their names."""
        scores: dict[str, Any] = {}
        for i, name in enumerate(self.evaluator.sets):
            metrics = below(result.metrics, f"eval/{name}/")
            of_set = _scores_of_set(metrics)
            if i == 0:
                scores |= of_set
            else:
                scores[name] = of_set
        return scores


def _scores_of_set(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the scores of one set, those of its families and of the panel in groups of their
    own.
    """
    scores: dict[str, Any] = {}
    for key, value in metrics.items():
        if not key.startswith(("family/", "panel/")):
            scores[key.removeprefix("part/")] = value
    scores["families"] = below(metrics, "family/")
    scores["panel"] = below(metrics, "panel/")
    return scores


def log_image(trainer: Trainer, sheet: Image.Image, path: Path, iteration: int) -> None:
    """Send one composed grid to the trackers that take images."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("images", [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            # A copy that may be written to, since torch warns of memory that may not.
            writable = bytearray(sheet.tobytes())
            pixels = torch.frombuffer(writable, dtype=torch.uint8)
            picture = pixels.view(sheet.height, sheet.width, 3)
            logger.experiment.add_image("images", picture, iteration, dataformats="HWC")
