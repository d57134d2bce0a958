"""Measure what a reward behind a server costs, and what scoring beside the rollout saves; always
side by side, alternating.

    python scripts/benchmark_rewards.py          # the server's throughput against the scorer's own
    python scripts/benchmark_rewards.py --overlap --delay 0.5   # with and without overlap

`--overlap` trains with a remote scorer that takes `--delay` seconds a request longer than the
verifier, then with the verifier in process; every other iteration scores only after all rollouts,
as if there were no overlap.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmark import fit
from hydra.utils import instantiate
from lightning import Callback, Trainer
from torch import Tensor

from flowrl.launch.compose import compose
from flowrl.prompts.shapes import shapes_prompts
from flowrl.rewards.shapes import ShapesReward
from flowrl.shapes.grammar import parse
from flowrl.shapes.render import lay_out, render
from flowrl.speed.clock import seconds
from flowrl.training.policy import Policy
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt, RewardOutput


class Slow:
    """The verifier, which answers after `delay` seconds."""

    def __init__(self, *, delay: float) -> None:
        self.delay = delay
        self.reward = ShapesReward(score="soft")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        time.sleep(self.delay)
        return self.reward(images, prompts)


@contextmanager
def server(*overrides: str) -> Iterator[str]:
    """Run scripts/serve_reward.py on a free port, and give its address."""
    script = Path(__file__).with_name("serve_reward.py")
    process = subprocess.Popen(
        [sys.executable, str(script), "port=0", *overrides], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        yield process.stdout.readline().split()[3].removesuffix("/score")
    finally:
        process.terminate()
        process.wait()


def throughput(num_images: int, size: int, rounds: int) -> None:
    """Print how many images a second the scorer takes, by itself and behind a server."""
    prompts = shapes_prompts(split="held_in", count=num_images, seed=0)
    rng = random.Random(0)
    pictures = render([lay_out(parse(prompt.text), rng) for prompt in prompts])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    images = torch.nn.functional.interpolate(images, size=size) if size else images
    with server("reward=shapes") as url:
        cfg = compose(["name=benchmark", "reward=remote", f"reward.url={url}"])
        direct = ShapesReward(score="soft")
        remote = instantiate(cfg.reward)
        times: dict[str, list[float]] = {"direct": [], "server": []}
        for _ in range(rounds + 1):
            times["direct"].append(seconds(lambda: direct(images, prompts)))
            times["server"].append(seconds(lambda: remote(images, prompts)))
    rows = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratio = statistics.median(
        b / a for a, b in zip(times["direct"][1:], times["server"][1:], strict=True)
    )
    print(f"{num_images} images of {images.shape[-1]} pixels, medians of {rounds} rounds")
    for name, value in rows.items():
        print(f"{name:<8}{value:8.3f} s{num_images / value:10.0f} images/s")
    print(f"server over direct {ratio:.2f}")


class Alternating(Callback):
    """A callback that has every other iteration score after its rollouts, and times both kinds."""

    def __init__(self) -> None:
        self.times: dict[bool, list[float]] = {True: [], False: []}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.is_overlapped = batch_idx % 2 == 0
        assert isinstance(pl_module, Policy)
        pl_module.reward.__dict__.pop("submit", None)
        if not self.is_overlapped:
            pl_module.reward.__dict__["submit"] = lambda images, prompts, **_: Later(
                pl_module.reward, images, prompts
            )
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times[self.is_overlapped].append(time.perf_counter() - self.start)


class Later(Future[RewardOutput]):
    """A score that is computed when it is asked for its result."""

    def __init__(self, reward: RewardModule, images: Tensor, prompts: Sequence[Prompt]) -> None:
        super().__init__()
        self.arguments = reward, images, prompts

    def result(self, timeout: float | None = None) -> RewardOutput:
        reward, images, prompts = self.arguments
        return reward.score(images, prompts)


def overlap(name: str, overrides: list[str], pairs: int) -> None:
    """Print an iteration's time with scores beside the rollout, and after it."""
    alternating = Alternating()
    fit(overrides, 2 * pairs + 2, [alternating])
    beside = alternating.times[True][1:]
    after = alternating.times[False][1:]
    ratio = statistics.median(b / a for a, b in zip(after, beside, strict=True))
    print(
        f"{name:<28}after {statistics.median(after):.3f} s, beside {statistics.median(beside):.3f} "
        f"s an iteration; ratio {ratio:.3f}",
        flush=True,
    )


def main() -> None:
    """Measure the one or the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", help="configuration overrides, as for train.py (--overlap)"
    )
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument(
        "--delay", type=float, default=0.5, help="seconds that the slow remote scorer waits"
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds, or pairs of iterations")
    parser.add_argument("--images", type=int, default=288)
    parser.add_argument(
        "--size", type=int, default=0, help="pixels of an image's side; 0: the shapes world's own"
    )
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before the start")
    if not args.overlap:
        throughput(args.images, args.size, args.rounds)
        return
    slow = ["reward._target_=benchmark_rewards.Slow", "~reward.score"]
    slow.append(f"+reward.delay={args.delay}")
    with server(*slow, "max_batch=1024") as url:
        remote = ["reward=remote", f"reward.url={url}", "reward.batch_size=1024"]
        overlap(f"remote, {args.delay} s a request", [*args.overrides, *remote], args.rounds)
    overlap("verifier in process", args.overrides, args.rounds)


if __name__ == "__main__":
    raise SystemExit(run_program(main, computes=True))
