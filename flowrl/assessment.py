"""One policy evaluated into a folder: every image as a PNG and a line of JSON, resumable, then summed up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from flowrl.distances import Features, all_features
from flowrl.evaluation import Evaluator
from flowrl.grids import to_pil
from flowrl.modules.policy import Policy
from flowrl.panel import panel
from flowrl.statistics import Estimate, by_prompt, difference, estimate
from flowrl.types import Prompt, RewardOutput

Sample = dict[str, Any]
SAMPLES, SETTINGS, DRIFT = "samples.jsonl", "settings.json", "drift.json"
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
CHUNK = 64
"""Images that features are taken of at once."""


class Assessment:
    """The samples of one policy on the evaluator's sets, below `folder`.

    `settings` is whatever decides them. A folder with the same settings is gone on with where it stopped, one with
    others is refused.
    """

    def __init__(self, folder: Path, evaluator: Evaluator, settings: Mapping[str, Any]) -> None:
        self.folder, self.evaluator = folder, evaluator
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        path = folder / SETTINGS
        if path.is_file() and path.read_text() != text:
            raise ValueError(f"{folder} holds an evaluation with other settings; choose another --out, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to be drawn."""
        return all(len(self.samples(name)) == len(self.rows(name)) and self.drift(name) for name in self.evaluator.sets)

    def rows(self, name: str) -> list[Prompt]:
        """The prompt of every sample of a set."""
        return [prompt for prompt in self.evaluator.sets[name] for _ in range(self.evaluator.images_per_prompt)]

    def samples(self, name: str) -> list[Sample]:
        """The records so far, in order; a line that a kill cut short ends them."""
        path, found = self.folder / name / SAMPLES, []
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def drift(self, name: str) -> dict[str, float]:
        """The divergence from the reference, once it has been measured."""
        path = self.folder / name / DRIFT
        return json.loads(path.read_text()) if path.is_file() else {}

    def run(self, policy: Policy) -> None:
        """Draw and score what is missing, under the policy's current weights."""
        count = self.evaluator.images_per_prompt
        step = max(self.evaluator.batch_size // count, 1) * count
        for name in self.evaluator.sets:
            prompts, done = self.rows(name), self.samples(name)
            # Whole batches only, so that a resumed evaluation draws the same bits.
            done = done[: len(done) // step * step] if len(done) < len(prompts) else done
            (self.folder / name / "images").mkdir(parents=True, exist_ok=True)
            _write(self.folder / name / SAMPLES, "".join(json.dumps(sample) + "\n" for sample in done))
            for first in range(len(done), len(prompts), step):
                self._draw(policy, name, prompts[first : first + step], first)
                print(
                    f"{self.folder.name}/{name}: {min(first + step, len(prompts))} of {len(prompts)} images", flush=True
                )
            if not self.drift(name):
                kl = self.evaluator.kl_to_reference(policy, prompts)
                _write(self.folder / name / DRIFT, json.dumps({"kl_ref": kl}))

    def _draw(self, policy: Policy, name: str, prompts: Sequence[Prompt], first: int) -> None:
        images = self.evaluator.draw(policy, prompts, first).cpu()
        output = policy.reward.score(images.to(policy.device), prompts)
        looks, count = panel(images), self.evaluator.images_per_prompt
        # The mean over pairs of |a - b|^2 is twice the unbiased variance within the prompt.
        groups = images.unflatten(0, (-1, count)).flatten(2)
        spread = (2 * groups.var(1, correction=1)).mean(1) if count > 1 else torch.full((len(groups),), math.nan)
        lines = []
        for i, prompt in enumerate(prompts):
            file = f"images/{first + i:06d}.png"
            to_pil(images[i]).save(self.folder / name / file)
            sample = {"row": first + i, "prompt": prompt.text, "family": prompt.family, "file": file}
            sample |= _scores(output, i) | {"spread": _number(spread[i // count])}
            sample["panel"] = {key: float(values[i]) for key, values in looks.items()}
            lines.append(json.dumps(sample) + "\n")
        with (self.folder / name / SAMPLES).open("a") as records:
            records.writelines(lines)

    def images(self, name: str) -> Iterator[Float[Tensor, "B 3 S S"]]:
        """The stored images of a set, in batches."""
        return read_images([self.folder / name / sample["file"] for sample in self.samples(name)])

    def features(self, name: str, features: Features) -> Float[Tensor, "N D"]:
        """The features of a set's stored images."""
        return all_features(features, self.images(name))

    def prompt_means(self, name: str) -> dict[str, Float[Tensor, "P"]]:
        """Every metric of a set as one mean a prompt: reward, its parts, the panel and the squared spread."""
        samples = self.samples(name)
        prompts = torch.arange(len(samples)) // self.evaluator.images_per_prompt
        columns: dict[str, list[float]] = {}
        for i, sample in enumerate(samples):
            values = {"reward": sample["reward"], "spread": sample["spread"]} | sample["parts"]
            values |= {f"panel/{key}": value for key, value in sample["panel"].items()}
            for key, value in values.items():
                columns.setdefault(key, [math.nan] * len(samples))[i] = math.nan if value is None else value
        return {key: by_prompt(torch.tensor(values), prompts) for key, values in columns.items()}

    def summary(self, name: str, base: Assessment | None) -> dict[str, Any]:
        """Estimates of all metrics of a set, and of their differences from the base model's, prompt by prompt."""
        means, samples = self.prompt_means(name), self.samples(name)
        others = base.prompt_means(name) if base else {}
        missing = sum(not sample["is_valid"] for sample in samples) / max(len(samples), 1)
        return {
            "num_images": len(samples),
            "missing": missing,
            "kl_ref": self.drift(name).get("kl_ref"),
            "diversity": _root(estimate(means.pop("spread"))),
            "metrics": {key: _plain(estimate(values)) for key, values in means.items()},
            "changes": {key: _plain(difference(values, others[key])) for key, values in means.items() if key in others},
        }


def _scores(output: RewardOutput, i: int) -> Sample:
    is_valid = bool(output.is_valid[i])
    parts = {key: _number(values[i]) if is_valid else None for key, values in output.parts.items()}
    reward = _number(output.values[i]) if is_valid else None
    return {"reward": reward, "is_valid": is_valid, "parts": parts, "info": dict(output.info[i]) if output.info else {}}


def _number(value: Tensor) -> float | None:
    return float(value) if value.isfinite() else None


def _plain(found: Estimate | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {"mean": found.mean, "low": found.low, "high": found.high, "num_prompts": found.num_prompts}


def _root(found: Estimate | None) -> dict[str, float] | None:
    """The root of a mean square, and of its interval."""
    plain = _plain(found)
    return plain and plain | {key: plain[key] ** 0.5 for key in ("mean", "low", "high")}


def folder_features(folder: str, features: Features) -> Float[Tensor, "N D"]:
    """The features of the pictures in a folder, of whatever sizes. Raises ValueError below two, or on a damaged one."""
    paths = [path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in PICTURES]
    if len(paths) < 2:
        raise ValueError(f"--reference {folder}: {len(paths)} pictures there; distances need at least 2")
    try:
        return all_features(features, read_images(sorted(paths, key=lambda path: (_size(path), path))))
    except OSError as error:
        raise ValueError(f"--reference {folder}: a picture is damaged ({error})") from error


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def read_images(paths: Sequence[Path]) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """Pictures as tensors in [0, 1], in order and in batches; where the size changes, a new batch begins."""
    batch: list[np.ndarray] = []
    for path in paths:
        with Image.open(path) as opened:
            picture = np.array(opened.convert("RGB"))
        if batch and (len(batch) == CHUNK or picture.shape != batch[0].shape):
            yield _stack(batch)
            batch = []
        batch.append(picture)
    if batch:
        yield _stack(batch)


def _stack(pictures: Sequence[np.ndarray]) -> Float[Tensor, "B 3 H W"]:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
