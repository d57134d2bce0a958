"""An experiment in Python: load it, draw, score, train some iterations, look at pictures, save."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from jaxtyping import Float
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image
from torch import Tensor

from flowrl.api.iterations import Iterate
from flowrl.api.objects import node_of, release
from flowrl.errors import UserError
from flowrl.evaluation.drawing import draw_prompt
from flowrl.evaluation.evaluator import Evaluator
from flowrl.images.contact_sheet import comparison
from flowrl.launch.build import build
from flowrl.launch.compose import compose
from flowrl.launch.lora_keys import take_from_file
from flowrl.launch.quiet import quieten
from flowrl.launch.validate import validate
from flowrl.losses.protocol import Loss
from flowrl.models.text import device
from flowrl.prompts.lines import checked_text
from flowrl.prompts.pictures import sources_of
from flowrl.rewards.protocol import Reward
from flowrl.runs.base_model import named_here
from flowrl.training.export import export_average
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import PromptData
from flowrl.tuning.formats import WHOLE
from flowrl.tuning.layer_names import NAMES
from flowrl.tuning.metadata import notes_of
from flowrl.tuning.weights import swapped
from flowrl.types import Prompt, RewardOutput

Prompts = str | Prompt | Sequence[str | Prompt]
PER_ROW = 4
"""Prompts side by side in `pictures`."""


def load(*overrides: str, reward: Reward | None = None, loss: Loss | None = None) -> Experiment:
    """Load an experiment: its model, reward, training prompts and evaluation, on the GPU where
    there is one.

    `overrides` are those of `flowrl train`, such as `"sampler=cps"` or `"experiment=flow_grpo"`; an
    experiment writes no run folder and logs to no tracker. `reward` and `loss` are objects that
    take the place of the configured ones. Raises UserError for a key, a value or a combination that
    is refused, and Hydra's errors for unknown keys and options.
    """
    quieten()
    cfg = compose(["name=notebook", "logger=none", *overrides])
    with open_dict(cfg):
        for key, value in {"reward": reward, "loss": loss}.items():
            if value is not None:
                cfg[key] = node_of(value)
    for key in ("resume", "run_dir"):
        if cfg[key] is not None:
            raise UserError(f"{key}={cfg[key]}: an experiment in Python has no run folder")
    take_from_file(cfg, overrides)
    validate(cfg)
    if cfg.batch.num_processes > 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: an experiment in Python is one process; train "
            "on several with the command"
        )
    try:
        return Experiment(cfg, *build(cfg))
    finally:
        # The experiment has them now; kept here, they would stay for as long as the notebook.
        release()


class Experiment:
    """A policy with its training prompts and its evaluator, as `load` builds it from `cfg`.

    Everything that draws uses the evaluation's steps and guidance, and the average of the trained
    weights (EMA), which is what `save` writes. `history` has the metrics of every iteration.
    """

    def __init__(
        self, cfg: DictConfig, policy: Policy, data: PromptData, evaluator: Evaluator
    ) -> None:
        self.cfg = cfg
        self.policy = policy
        self.data = data
        self.evaluator = evaluator
        self.history: list[dict[str, float]] = []
        self._iterate = Iterate()
        self._move()

    def _move(self) -> None:
        """Move all that is asked to the GPU where there is one; Lightning takes it away after
        training.
        """
        policy = self.policy
        for module in (policy, policy.model, policy.embed, policy.reward):
            module.to(device())
        average = policy.ema.weights
        policy.ema.weights = {name: value.to(device()) for name, value in average.items()}

    def draw(
        self,
        prompts: Prompts,
        *,
        count: int = 1,
        seed: int | None = None,
        is_reference: bool = False,
    ) -> Float[Tensor, "B *F 3 H W"]:
        """Draw `count` images of each prompt, prompt by prompt, with values in [0, 1] on the CPU.

        The noise depends on the seed, by default `evaluation.seed`, and an image's place alone, so
        that `is_reference`, which draws with the frozen reference instead, gives the same images
        before training. Raises UserError for a prompt that is no text.
        """
        asked = _as_prompts(prompts)
        policy = self.policy
        embed = instantiate(self.cfg.embeddings)(policy.model, asked)
        embed.to(device())
        weights = policy.tuning.at_reference()
        if not is_reference:
            weights = swapped(policy.tuning.parameters(), policy.ema.weights)
        images = []
        with weights:
            for number, prompt in enumerate(asked):
                drawn = draw_prompt(
                    policy.model,
                    embed,
                    self.evaluator,
                    prompt,
                    number=number,
                    count=count,
                    seed=self.evaluator.seed if seed is None else seed,
                )
                images.append(drawn.cpu())
        return torch.cat(images)

    def score(self, images: Float[Tensor, "B *F 3 H W"], prompts: Prompts) -> RewardOutput:
        """Score images of prompts as training does: `values` and, by their names, `parts`.

        There are as many images as prompts, or a multiple, as `draw` gives them: then each prompt
        is that of so many images. Raises UserError where the numbers do not fit.
        """
        asked = _as_prompts(prompts)
        count, rest = divmod(len(images), len(asked))
        if rest or not count:
            raise UserError(
                f"{len(images)} images of {len(asked)} prompts: give one image a prompt, or "
                "equally many of each"
            )
        repeated = [prompt for prompt in asked for _ in range(count)]
        return self.policy.reward.score(images.to(device()), repeated, count)

    def train(
        self, num_iterations: int, tell: Callable[[Mapping[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Train for so many iterations, and return the metrics of each, by the glossary's names.

        Further calls go on where the last one ended: two of 5 iterations give the same weights as
        one of 10, bitwise. `tell` is given an iteration's metrics as soon as it is over. The
        learning rate's course is that of `num_iterations` in the configuration, beyond which there
        is nothing to train: UserError. After Ctrl-C the running iteration is ended and
        KeyboardInterrupt raised; `history` has what was done, and a further call goes on. A second
        Ctrl-C stops within the iteration, after which the experiment is to be loaded anew.
        """
        left = len(self.data.iterations) - self.policy.num_iterations
        if not 0 < num_iterations <= left:
            raise UserError(
                f"train({num_iterations}): {left} of num_iterations={len(self.data.iterations)} "
                "are left; give at least 1 of them, or load with more"
            )
        self.data.start_iteration = self.policy.num_iterations
        self._iterate.begin(tell)
        trainer: Trainer = instantiate(
            self.cfg.trainer,
            callbacks=[self._iterate],
            logger=False,
            enable_progress_bar=False,
            limit_train_batches=num_iterations,
        )
        try:
            with self._iterate.heeding_interrupts():
                trainer.fit(self.policy, datamodule=self.data)
        finally:
            self.history += self._iterate.rows
            self._move()
        if self._iterate.is_interrupted:
            raise KeyboardInterrupt
        return self._iterate.rows

    def evaluate(self) -> dict[str, float]:
        """Evaluate the average on the evaluation's prompt sets, and return its metrics by the
        glossary's names.
        """
        return dict(self.evaluator.evaluate(self.policy).metrics)

    def pictures(self, prompts: Prompts, *, seed: int | None = None) -> Image.Image:
        """Draw the reference's and the trained policy's image of each prompt, from the same noise,
        beside each other with their rewards.
        """
        asked = _as_prompts(prompts)
        columns = []
        for title, is_reference in (("before", True), ("now", False)):
            images = self.draw(asked, seed=seed, is_reference=is_reference)
            columns.append((title, images, self.score(images, asked).values.tolist()))
        captions = [prompt.text for prompt in asked]
        per_row = min(PER_ROW, len(asked))
        return comparison(captions, columns, per_row=per_row, sources=sources_of(asked))

    def save(self, folder: str | Path) -> Path:
        """Write the average below `folder` as stock diffusers loads it, and return where: a LoRA
        for `pipe.load_lora_weights`, or after full fine-tuning a transformer for `from_pretrained`.

        What an earlier call wrote there is replaced. Raises NotFinite where a weight is no number,
        and UserError where files of another kind are in the way.
        """
        folder = Path(folder)
        target = folder / self.policy.tuning.folder_name
        written = {NAMES["diffusers"], "config.json"}
        for path in target.rglob("*"):
            if path.name not in written and not path.name.startswith(WHOLE):
                raise UserError(f"save: {target} holds {path.name}, too; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        return export_average(self.policy, folder, notes_of(named_here(self._described())))

    def _described(self) -> dict[str, Any]:
        """Return the configuration, with objects made in Python by their classes."""
        described: Any = OmegaConf.to_container(self.cfg, resolve=True)
        objects = {"reward": self.policy.reward.reward, "loss": self.policy.algorithm.loss}
        for key, value in objects.items():
            described[key]["_target_"] = f"{type(value).__module__}.{type(value).__qualname__}"
        return {str(key): value for key, value in described.items()}


def _as_prompts(prompts: Prompts) -> list[Prompt]:
    """Return the prompts of one text or several. Raises UserError where there is none."""
    several = [prompts] if isinstance(prompts, str | Prompt) else list(prompts)
    if not several:
        raise UserError("prompts: give at least one")
    asked = []
    for prompt in several:
        if not isinstance(prompt, Prompt):
            prompt = Prompt(checked_text(prompt, "prompts"))
        asked.append(prompt)
    return asked
