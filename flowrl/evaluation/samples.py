"""The evaluation of one policy into a folder: every image is a PNG, which moves where it is a clip,
and a line of JSON, and a stopped one goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from flowrl.errors import UserError
from flowrl.evaluation.evaluator import Evaluator
from flowrl.images.contact_sheet import save_sample
from flowrl.models.weights import require_finite
from flowrl.prompts.subsets import same_texts
from flowrl.runs.files import read_object, read_text, write_whole
from flowrl.statistics import by_prompt
from flowrl.training.policy import Policy
from flowrl.types import Prompt, RewardOutput

Sample = dict[str, Any]
SAMPLES = "samples.jsonl"
SETTINGS = "settings.json"
DRIFT = "drift.json"
KEYS = {
    "row",
    "prompt",
    "family",
    "file",
    "reward",
    "is_valid",
    "parts",
    "spread",
    "panel",
}
"""What a record of a sample has."""
REMEDY = "choose another --out, or remove that folder"


class Assessment:
    """The samples of one policy on the evaluator's sets, below `folder`.

    `settings` is whatever decides them. A folder with the same settings is gone on with where it
    stopped; one with others is refused with a UserError that names the keys that differ.
    """

    def __init__(
        self,
        folder: Path,
        evaluator: Evaluator,
        settings: Mapping[str, Any],
    ) -> None:
        self.folder = folder
        self.evaluator = evaluator
        digests = {name: _digest(prompts) for name, prompts in evaluator.sets.items()}
        every_setting = dict(settings) | {"prompts": digests}
        text = json.dumps(every_setting, indent=2, sort_keys=True, default=str)
        path = folder / SETTINGS
        if path.is_file():
            known = read_object(path, REMEDY)
            known.setdefault("prompts", digests)  # which earlier versions did not keep
            # Compared as JSON gives them back, where a tuple has become a list.
            wanted = json.loads(text)
            changed = [key for key, value in wanted.items() if known.get(key) != value]
            if changed:
                names = ", ".join(changed)
                raise UserError(
                    f"{folder} holds an evaluation with other settings ({names}); {REMEDY}"
                )
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)

    @property
    def is_complete(self) -> bool:
        """True where nothing is left to be drawn."""
        for name in self.evaluator.sets:
            num_missing = len(self.rows(name)) - len(self.samples(name))
            if num_missing or not self.drift(name):
                return False
        return True

    def rows(self, name: str) -> list[Prompt]:
        """Return the prompt of every sample of a set: each prompt as often as it has images."""
        rows = []
        for prompt in self.evaluator.sets[name]:
            rows += [prompt] * self.evaluator.images_per_prompt
        return rows

    def samples(self, name: str) -> list[Sample]:
        """Return the records so far, in order; a line that a kill cut short ends them.

        Raises UserError, naming the line, for one that is no record.
        """
        path = self.folder / name / SAMPLES
        if not path.is_file():
            return []
        # Every whole line ends with a line end, so after the last one stands nothing, or what a
        # kill left of a line.
        *whole, _cut = read_text(path, REMEDY).split("\n")
        return [_record(line, f"{path} line {i}") for i, line in enumerate(whole, 1)]

    def drift(self, name: str) -> dict[str, float]:
        """Return the divergence from the reference under `kl_ref`, once it has been measured;
        before that, nothing.
        """
        path = self.folder / name / DRIFT
        if not path.is_file():
            return {}
        return read_object(path, "remove it, and it is measured again")

    def run(self, policy: Policy) -> None:
        """Draw and score what is missing, under the policy's current weights, which must be numbers
        (NotFinite).

        Images come in turn, each with a printed line on how far a set is, and stay when this is
        interrupted.
        """
        require_finite({"trained": policy.tuning.parameters()})
        for name in self.evaluator.sets:
            prompts = self.rows(name)
            self._draw_missing(policy, name, prompts)
            if not self.drift(name):
                print(f"{self.folder.name}/{name}: measuring the KL to the reference", flush=True)
                kl = self.evaluator.kl_to_reference(policy, prompts)
                write_whole(self.folder / name / DRIFT, json.dumps({"kl_ref": kl}))

    def _draw_missing(self, policy: Policy, name: str, prompts: Sequence[Prompt]) -> None:
        """Draw the samples of a set that have no record yet."""
        folder = self.folder / name
        total = len(prompts)
        # All images of a prompt are drawn at once, since their spread is measured there.
        count = self.evaluator.images_per_prompt
        step = max(self.evaluator.batch_size // count, 1) * count
        done = self.samples(name)
        if len(done) < total:
            # Whole batches only, so that a resumed evaluation draws the same bits.
            num_kept = len(done) // step * step
            done = done[:num_kept]
        (folder / "images").mkdir(parents=True, exist_ok=True)
        # Written anew, which drops the line that a kill cut short: others are appended behind it.
        write_whole(folder / SAMPLES, "".join(map(_line, done)))
        for first in range(len(done), total, step):
            batch = prompts[first : first + step]
            self._draw(policy, name, batch, first)
            num_drawn = first + len(batch)
            print(f"{self.folder.name}/{name}: {num_drawn} of {total} images", flush=True)

    def _draw(
        self,
        policy: Policy,
        name: str,
        prompts: Sequence[Prompt],
        first: int,
    ) -> None:
        """Draw, score and store the samples of a set from row `first` on."""
        images, share = self.evaluator.draw_and_score(policy, prompts, first)
        lines = []
        for i, prompt in enumerate(prompts):
            row = first + i
            file = f"images/{row:06d}.png"
            save_sample(images[i], self.folder / name / file)
            sample = {
                "row": row,
                "prompt": prompt.text,
                "family": prompt.family,
                "file": file,
                **_scores(share.scores, i),
                "spread": _number(share.spread[i]),
                "panel": {key: _number(values[i]) for key, values in share.looks.items()},
            }
            lines.append(_line(sample))
        # The records come last: an image without one is drawn again.
        with (self.folder / name / SAMPLES).open("a") as records:
            records.writelines(lines)

    def files(self, name: str) -> list[Path]:
        """Return the stored images of a set, in order."""
        return [self.folder / name / sample["file"] for sample in self.samples(name)]

    def texts(self, name: str) -> Int[np.ndarray, "P"]:
        """Return a number for each prompt of a set, equal for those of one text."""
        return same_texts(self.evaluator.sets[name])

    def prompt_means(self, name: str) -> dict[str, Float[np.ndarray, "P"]]:
        """Return every metric of a set as one mean a prompt: `reward`, its parts by their names,
        the panel under `panel/NAME`, and the squared spread under `spread`.

        A value that a record lacks, or has as null, is NaN.
        """
        samples = self.samples(name)
        count = len(samples)
        # The number of each sample's prompt.
        prompts = np.arange(count) // self.evaluator.images_per_prompt
        columns: dict[str, np.ndarray] = {}
        for i, sample in enumerate(samples):
            for key, value in _values(sample).items():
                if key not in columns:
                    columns[key] = np.full(count, math.nan)
                if value is not None:
                    columns[key][i] = value
        return {key: by_prompt(values, prompts) for key, values in columns.items()}


def _values(sample: Sample) -> dict[str, float | None]:
    """Return the metrics of one record."""
    values = {"reward": sample["reward"], "spread": sample["spread"]}
    values |= sample["parts"]
    for key, value in sample["panel"].items():
        values[f"panel/{key}"] = value
    return values


def _line(sample: Sample) -> str:
    """Write the line of a record."""
    return json.dumps(sample) + "\n"


def _record(line: str, place: str) -> Sample:
    """Read the record in a line, which stands at `place`. Raises UserError for anything else."""
    try:
        sample = json.loads(line)
        if not sample.keys() >= KEYS:
            raise UserError("no record of a sample")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{place} is damaged ({error}); {REMEDY}") from error
    return sample


def _digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of all that the prompts of a set say."""
    rows = [
        [prompt.text, prompt.family, dict(prompt.metadata), *prompt.digests] for prompt in prompts
    ]
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _scores(output: RewardOutput, i: int) -> Sample:
    """Return what the record of sample `i` says of its reward; null stands for what is missing."""
    is_valid = bool(output.is_valid[i])
    reward = None
    parts: dict[str, float | None] = dict.fromkeys(output.parts)
    if is_valid:
        reward = _number(output.values[i])
        parts = {key: _number(values[i]) for key, values in output.parts.items()}
    return {
        "reward": reward,
        "is_valid": is_valid,
        "parts": parts,
        "info": dict(output.info[i]) if output.info else {},
    }


def _number(value: Tensor) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return float(value) if value.isfinite() else None
