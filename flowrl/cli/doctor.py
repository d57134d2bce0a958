"""Examine a configured reward on images rendered on the spot: does it order, does it repeat, how
long does it take?

    python scripts/reward_doctor.py reward=ocr
    python scripts/reward_doctor.py reward=pickscore reward.pretrained=/models/PickScore_v1
    python scripts/reward_doctor.py --config-dir conf reward=my_own --pairs content text

Each reward of a mixture is examined by itself. Exit status 1 if a check fails. The checks: good
images score above bad ones (of the kinds of pairs that the reward is about, or those of --pairs);
scores are finite, differ, and lie in the reward's range; a second call gives the same; an image
alone gives what it gives in a batch; tensors give what pictures give; an image takes no longer than
--max-seconds.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import logging
import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from hydra.utils import instantiate
from PIL import Image

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.launch.compose import compose
from flowrl.launch.quiet import quieten
from flowrl.launch.search_path import with_config_dir
from flowrl.launch.services import check_services
from flowrl.launch.validate import validate
from flowrl.rewards import attempt
from flowrl.rewards.images import to_tensor
from flowrl.rewards.mixture import Mixture
from flowrl.rewards.protocol import Reward
from flowrl.rewards.routed import Routed
from flowrl.rewards.specimens import Pair, pairs
from flowrl.training.reward import RewardModule
from flowrl.values.plural import counted

TOLERANCE = 1e-4
"""Difference that two scores of one image may have, in units of the scores' spread over all images.
"""


@dataclass(frozen=True, slots=True)
class Expectation:
    """The kinds of pairs that a reward must order, and the range of its scores."""

    kinds: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf


EXPECTED = {
    "ShapesReward": Expectation(("shapes",), 0, 1),
    "OCR": Expectation(("text",), 0, 1),
    "JPEG": Expectation(("size",)),
    "BRISQUE": Expectation(("sharpness",), -2, 1),
    "CLIPScore": Expectation(("content",), -5, 5),
    "HPSv2": Expectation(("content",), -1, 1),
    "ImageReward": Expectation(("content",), -5, 5),
    "Aesthetic": Expectation((), -5, 15),
    "GenEval": Expectation(("objects",), -15, 1),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table; `passed` None means that there was nothing to check."""

    name: str
    passed: bool | None
    detail: str


class Patient:
    """A reward, and its scores of the good and the bad image of every pair."""

    def __init__(self, reward: Reward, chosen: Sequence[Pair]) -> None:
        self.module = RewardModule(reward=reward, max_missing=1.0)
        self.module.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pairs = chosen
        self.pictures = [picture for pair in chosen for picture in (pair.good, pair.bad)]
        self.prompts = [pair.prompt for pair in chosen for _ in range(2)]
        start = time.perf_counter()
        self.scores, self.is_valid, self.applies = self.score(range(len(self.pictures)))
        self.first_seconds = time.perf_counter() - start
        spread = float(self.scores[self.usable].std()) if self.usable.sum() > 1 else 0.0
        self.spread = max(spread, 1e-12)

    @property
    def usable(self) -> torch.Tensor:
        """Tell of each image whether the reward judges it and could score it."""
        return self.is_valid & self.applies

    def score(
        self, rows: Sequence[int], *, as_tensors: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score some of the images: values, whether each is valid, and whether the reward applies
        to it.

        Images of one size make a call, since all of a training batch have one size.
        """
        sizes: dict[tuple[int, int], list[int]] = {}
        for place, row in enumerate(rows):
            sizes.setdefault(self.pictures[row].size, []).append(place)
        values = torch.zeros(len(rows))
        is_valid = torch.zeros(len(rows), dtype=torch.bool)
        applies = torch.zeros(len(rows), dtype=torch.bool)
        for places in sizes.values():
            pictures: list[Image.Image] = [self.pictures[rows[place]] for place in places]
            prompts = [self.prompts[rows[place]] for place in places]
            output = self.module.score(to_tensor(pictures) if as_tensors else pictures, prompts)
            assert output.applies is not None
            values[places] = output.values
            is_valid[places] = output.is_valid
            applies[places] = output.applies.any(1)
        return values, is_valid, applies

    def difference(self, other: torch.Tensor) -> float:
        """Return the largest difference from the first scores, in units of their spread; NaN
        without any score.
        """
        if not self.usable.any():
            return math.nan
        return float((self.scores - other)[self.usable].abs().max()) / self.spread


def _expectation(reward: Reward) -> Expectation:
    """Return what is expected of a reward's class, or of the class that it derives from."""
    # By name, since importing every reward would need the extra packages of all.
    names = [kind.__name__ for kind in type(reward).__mro__]
    return next((EXPECTED[name] for name in names if name in EXPECTED), Expectation(()))


def examine(reward: Reward, kinds: Sequence[str] | None, max_seconds: float) -> list[Check]:
    """Make all checks of one reward."""
    expected = _expectation(reward)
    wanted = tuple(kinds) if kinds else expected.kinds
    patient = Patient(reward, _chosen_pairs(wanted))
    start = time.perf_counter()
    again, _, _ = patient.score(range(len(patient.pictures)))
    seconds = (time.perf_counter() - start) / len(patient.pictures)
    tensors, _, _ = patient.score(range(len(patient.pictures)), as_tensors=True)
    alone = torch.cat([patient.score([row])[0] for row in range(len(patient.pictures))])
    # The good image of a size pair has the smaller file, which an incompressibility reward, whose
    # scale is positive, likes less.
    likes_good = wanted != ("size",) or getattr(reward, "scale", -1.0) < 0
    return [
        Check("scored", bool(patient.usable.any()), _census(patient)),
        _ordering(patient, wanted, 1.0 if likes_good else -1.0),
        _range(patient, expected),
        _same("determinism", patient, again, 0.0),
        _same("batch of one", patient, alone, TOLERANCE),
        _same("tensor input", patient, tensors, TOLERANCE),
        _latency(patient, seconds, max_seconds),
    ]


def _latency(patient: Patient, seconds: float, max_seconds: float) -> Check:
    """Check the `seconds` of one image; how soon a reward fails says nothing of them."""
    if not patient.usable.any():
        return Check("latency", None, "no image has a score")
    return Check(
        "latency",
        seconds <= max_seconds,
        f"{1000 * seconds:.1f} ms an image (first batch {patient.first_seconds:.1f} s), "
        f"allowed {1000 * max_seconds:.0f} ms",
    )


def _chosen_pairs(kinds: Sequence[str]) -> list[Pair]:
    """Return the pairs of the kinds, all pairs without any. Raises UserError for an unknown one."""
    every = pairs()
    known = {pair.kind for pair in every}
    if unknown := set(kinds) - known:
        raise UserError(f"--pairs {' '.join(sorted(unknown))}: choose of {', '.join(known)}")
    return [pair for pair in every if pair.kind in kinds] or every


def _range(patient: Patient, expected: Expectation) -> Check:
    values = patient.scores[patient.usable]
    low = float(values.min()) if len(values) else math.nan
    high = float(values.max()) if len(values) else math.nan
    is_inside = expected.low <= low < high <= expected.high
    detail = f"{low:.4g} to {high:.4g}, allowed {expected.low:g} to {expected.high:g}"
    return Check("range", is_inside, detail)


def _census(patient: Patient) -> str:
    missing = (~patient.is_valid).sum()
    outside = (~patient.applies).sum()
    return f"{counted(len(patient.pictures), 'image')}, {missing} missing, {outside} not judged"


def _ordering(patient: Patient, wanted: Sequence[str], direction: float) -> Check:
    """Check that good images score above bad ones, or with a `direction` of -1 below them."""
    if not wanted:
        return Check("ordering", None, "no expectation for this reward; say --pairs")
    good = patient.scores[::2]
    bad = patient.scores[1::2]
    is_right = (direction * (good - bad) > 0) & patient.usable[::2] & patient.usable[1::2]
    detail = f"{int(is_right.sum())} of {len(is_right)} pairs of {', '.join(wanted)}"
    for i, pair in enumerate(patient.pairs):
        if not is_right[i]:
            detail += f"; wrong: {pair.prompt.text} ({float(good[i]):.4g}, {float(bad[i]):.4g})"
    return Check("ordering", bool(is_right.all()), detail)


def _same(name: str, patient: Patient, other: torch.Tensor, tolerance: float) -> Check:
    difference = patient.difference(other)
    return Check(
        name,
        difference <= tolerance,
        f"differs by {difference:.1e} of the spread, allowed {tolerance:.0e}",
    )


@contextmanager
def same_failures_once() -> Iterator[None]:
    """Let each traceback of a failed call be printed once, and say at the end how many others were
    the same.
    """
    seen: dict[str, int] = {}

    def is_new(record: logging.LogRecord) -> bool:
        if record.exc_info is None:
            return True
        text = "".join(traceback.format_exception(*record.exc_info))
        seen[text] = seen.get(text, 0) + 1
        return seen[text] == 1

    attempts = logging.getLogger(attempt.__name__)
    attempts.addFilter(is_new)
    try:
        yield
    finally:
        attempts.removeFilter(is_new)
        for text, count in seen.items():
            if count > 1:
                last = text.strip().splitlines()[-1]
                print(f"{counted(count - 1, 'more call')} failed in the same way: {last}")


def members(name: str, reward: Reward) -> dict[str, Reward]:
    """Return the single rewards inside mixtures and routes, by name."""
    if isinstance(reward, Routed):
        return members(name, reward.reward)
    if not isinstance(reward, Mixture):
        return {name: reward}
    singles: dict[str, Reward] = {}
    for key, member in (reward.trained | reward.monitors).items():
        singles |= members(key, member)
    return singles


def run(overrides: Sequence[str], kinds: Sequence[str] | None, max_seconds: float) -> None:
    """Examine each reward of the configuration, and print a line for each check."""
    quieten()
    cfg = compose(["name=doctor", *overrides])
    validate(cfg)
    name = next((item.split("=")[1] for item in overrides if item.startswith("reward=")), "shapes")
    check_services(cfg.reward)
    failed = 0
    print(f"{'reward':<16} {'check':<13} {'':<5} detail")
    for label, reward in members(name, instantiate(cfg.reward)).items():
        with same_failures_once():
            checks = examine(reward, kinds, max_seconds)
        for check in checks:
            verdict = {True: "ok", False: "FAIL", None: "-"}[check.passed]
            failed += check.passed is False
            print(f"{label:<16} {check.name:<13} {verdict:<5} {check.detail}", flush=True)
    if failed:
        raise UserError(f"{counted(failed, 'check')} failed")


def main() -> int:
    """Read the command line and examine; 1 where a check fails."""

    def examine_all() -> None:
        args = arguments.doctor().parse_intermixed_args()
        overrides = with_config_dir(args.overrides, args.config_dir)
        run(overrides, args.pairs, args.max_seconds)

    return run_program(examine_all, computes=True)


if __name__ == "__main__":
    sys.exit(main())
