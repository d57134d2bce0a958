"""The evaluation of one policy into a folder: every image is a PNG and a line of JSON, and a
stopped one goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowrl.errors import UserError
from flowrl.evaluation.evaluator import Evaluator
from flowrl.images.contact_sheet import to_pil
from flowrl.images.image_statistics import panel
from flowrl.prompts.subsets import same_texts
from flowrl.runs.files import read_object, read_text, write_whole
from flowrl.statistics import by_prompt
from flowrl.training.metric_means import require_finite
from flowrl.training.policy import Policy
from flowrl.types import Prompt, RewardOutput

Sample = dict[str, Any]
SAMPLES = "samples.jsonl"
SETTINGS = "settings.json"
DRIFT = "drift.json"
KEYS = {"row", "prompt", "family", "file", "reward", "is_valid", "parts", "spread", "panel"}
"""What a record of a sample has."""
REMEDY = "choose another --out, or remove that folder"


class Assessment:
    """The samples of one policy on the evaluator's sets, below `folder`.

    `settings` is whatever decides them. A folder with the same settings is gone on with where it
    stopped, one with others is refused.
    """

    def __init__(self, folder: Path, evaluator: Evaluator, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.evaluator = evaluator
        digests = {name: _digest(prompts) for name, prompts in evaluator.sets.items()}
        every_setting = dict(settings) | {"prompts": digests}
        text = json.dumps(every_setting, indent=2, sort_keys=True, default=str)
        path = folder / SETTINGS
        if path.is_file():
            known = read_object(path, REMEDY)
            known.setdefault("prompts", digests)  # which earlier versions did not keep
            changed = [key for key, value in json.loads(text).items() if known.get(key) != value]
            if changed:
                raise UserError(
                    f"{folder} holds an evaluation with other settings ({', '.join(changed)}); "
                    f"{REMEDY}"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)

    @property
    def is_complete(self) -> bool:
        """True where nothing is left to be drawn."""
        return all(
            len(self.samples(name)) == len(self.rows(name)) and self.drift(name)
            for name in self.evaluator.sets
        )

    def rows(self, name: str) -> list[Prompt]:
        """Return the prompt of every sample of a set."""
        count = self.evaluator.images_per_prompt
        return [prompt for prompt in self.evaluator.sets[name] for _ in range(count)]

    def samples(self, name: str) -> list[Sample]:
        """Return the records so far, in order; a line that a kill cut short ends them."""
        path = self.folder / name / SAMPLES
        *whole, _cut = read_text(path, REMEDY).split("\n") if path.is_file() else [""]
        return [_record(line, f"{path} line {i}") for i, line in enumerate(whole, 1)]

    def drift(self, name: str) -> dict[str, float]:
        """Return the divergence from the reference, once it has been measured."""
        path = self.folder / name / DRIFT
        return read_object(path, "remove it, and it is measured again") if path.is_file() else {}

    def run(self, policy: Policy) -> None:
        """Draw and score what is missing, under the policy's current weights, which must be numbers
        (NotFinite).
        """
        require_finite({"trained": policy.tuning.parameters()})
        count = self.evaluator.images_per_prompt
        step = max(self.evaluator.batch_size // count, 1) * count
        for name in self.evaluator.sets:
            prompts = self.rows(name)
            done = self.samples(name)
            # Whole batches only, so that a resumed evaluation draws the same bits.
            done = done[: len(done) // step * step] if len(done) < len(prompts) else done
            (self.folder / name / "images").mkdir(parents=True, exist_ok=True)
            write_whole(
                self.folder / name / SAMPLES, "".join(json.dumps(sample) + "\n" for sample in done)
            )
            for first in range(len(done), len(prompts), step):
                self._draw(policy, name, prompts[first : first + step], first)
                print(
                    f"{self.folder.name}/{name}: {min(first + step, len(prompts))} of "
                    f"{len(prompts)} images",
                    flush=True,
                )
            if not self.drift(name):
                kl = self.evaluator.kl_to_reference(policy, prompts)
                write_whole(self.folder / name / DRIFT, json.dumps({"kl_ref": kl}))

    def _draw(self, policy: Policy, name: str, prompts: Sequence[Prompt], first: int) -> None:
        images = self.evaluator.draw(policy, prompts, first).cpu()
        count = self.evaluator.images_per_prompt
        output = policy.reward.score(images.to(policy.device), prompts, count)
        looks = panel(images)
        groups = images.unflatten(0, (-1, count)).flatten(2)
        if count > 1:
            # The mean over pairs of |a - b|^2 is twice the unbiased variance within the prompt.
            spread = (2 * groups.var(1, correction=1)).mean(1)
        else:
            spread = torch.full((len(groups),), math.nan)
        lines = []
        for i, prompt in enumerate(prompts):
            file = f"images/{first + i:06d}.png"
            to_pil(images[i]).save(self.folder / name / file)
            sample = {
                "row": first + i,
                "prompt": prompt.text,
                "family": prompt.family,
                "file": file,
                **_scores(output, i),
                "spread": _number(spread[i // count]),
                "panel": {key: _number(values[i]) for key, values in looks.items()},
            }
            lines.append(json.dumps(sample) + "\n")
        with (self.folder / name / SAMPLES).open("a") as records:
            records.writelines(lines)

    def files(self, name: str) -> list[Path]:
        """Return the stored images of a set, in order."""
        return [self.folder / name / sample["file"] for sample in self.samples(name)]

    def texts(self, name: str) -> Int[np.ndarray, "P"]:
        """Return a number for each prompt of a set, equal for those of one text."""
        return same_texts(self.evaluator.sets[name])

    def prompt_means(self, name: str) -> dict[str, Float[np.ndarray, "P"]]:
        """Return every metric of a set as one mean a prompt: reward, its parts, the panel and the
        squared spread.
        """
        samples = self.samples(name)
        prompts = np.arange(len(samples)) // self.evaluator.images_per_prompt
        columns: dict[str, np.ndarray] = {}
        for i, sample in enumerate(samples):
            values = {"reward": sample["reward"], "spread": sample["spread"]} | sample["parts"]
            values |= {f"panel/{key}": value for key, value in sample["panel"].items()}
            for key, value in values.items():
                column = columns.setdefault(key, np.full(len(samples), math.nan))
                if value is not None:
                    column[i] = value
        return {key: by_prompt(values, prompts) for key, values in columns.items()}


def _record(line: str, place: str) -> Sample:
    try:
        sample = json.loads(line)
        if not sample.keys() >= KEYS:
            raise UserError("no record of a sample")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{place} is damaged ({error}); {REMEDY}") from error
    return sample


def _digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of all that the prompts of a set say."""
    rows = [[prompt.text, prompt.family, dict(prompt.metadata)] for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _scores(output: RewardOutput, i: int) -> Sample:
    is_valid = bool(output.is_valid[i])
    scores = {key: values[i] for key, values in output.parts.items()}
    return {
        "reward": _number(output.values[i]) if is_valid else None,
        "is_valid": is_valid,
        "parts": {key: _number(value) if is_valid else None for key, value in scores.items()},
        "info": dict(output.info[i]) if output.info else {},
    }


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None
