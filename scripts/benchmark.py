"""Time training iterations against their bare parts, alternating in one process, and say where the
time goes.

    python scripts/benchmark.py                       # time: 10 iterations of the main job
    python scripts/benchmark.py --memory    # peak memory against steps and group size
    python scripts/benchmark.py sampler=flow_sde      # any override of train.py
    # On a GPU, SD3.5 Medium's size, 2 prompts x 16:
    python scripts/random_pipelines.py model=sd35_medium weights
    python scripts/benchmark.py experiment=flow_dppo_sd35 model.pretrained=weights \
        batch.prompts_per_iteration=2 \
        data.prompts.count=32 reward=jpeg_compressibility batch.max_micro_batch=8 --iterations 5

The share of a large matrix product's speed that the networks reach is given too: bare, and over the
run's phases.

The bare parts are the same transformer forwards and backwards, decodes and reward calls, batched as
the run batches them, in plain loops with nothing around them.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, Trainer
from torch.utils.flop_counter import FlopCounterMode

from flowrl.callbacks.record import peak_memory_gib
from flowrl.launch.build import build
from flowrl.launch.compose import compose
from flowrl.launch.quiet import quieten
from flowrl.objectives.micro_batch import ConditionedRows
from flowrl.rewards.attempt import attempt
from flowrl.rewards.clips import Clips
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import PromptBatch
from flowrl.training.sampling import sample_update


class BareParts:
    """The parts of one iteration of a policy, each as a plain loop over its micro-batches.

    Rows of a group are evaluated once while they are equal, exactly as the run does for the same
    iteration's steps.
    """

    def __init__(self, policy: Policy, batch: PromptBatch) -> None:
        self.policy = policy
        plan = policy.plan
        method = policy.algorithm
        stochastic = policy.objective.stochastic_steps(batch.iteration, 0)
        shares = method.shared_initial_noise
        sigmas = [interval.sigma for interval in method.intervals]
        self.rollout_steps = [
            (sigma, shares and k <= stochastic[0]) for k, sigma in enumerate(sigmas)
        ]
        trained = method.trained.candidates(stochastic)
        self.trained_steps = [(sigmas[k], shares and k == stochastic[0]) for k in trained]
        self.num_micro_batches = plan.num_samples // plan.micro_batch
        self.prompts = [batch.prompts[row // plan.group_size] for row in range(plan.num_samples)]
        starts = [row // plan.group_size if shares else row for row in range(plan.micro_batch)]
        self.group = group = ConditionedRows(
            *policy.embed.shared(self.prompts[: plan.micro_batch]), starts
        )
        self.is_checkpointed = bool(policy.transformer.is_gradient_checkpointing)
        self.field = group.field(policy.velocity)
        self.ref_field = group.field(policy.reference.velocity)
        self.x = torch.randn(plan.micro_batch, *policy.model.latent_shape, device=policy.device)
        # Real images: the verifier is slower on noise.
        [micro_batch] = sample_update(policy, batch, 0, [range(plan.micro_batch)])
        micro_batch.score.result()  # or it would go on beside what is timed next
        images = policy.model.decode(micro_batch.trajectory.x0)
        self.images = torch.cat([images] * self.num_micro_batches)

    @torch.no_grad()
    def rollout(self) -> None:
        """Evaluate the velocity at each step of the grid."""
        for _ in range(self.num_micro_batches):
            for sigma, is_shared in self.rollout_steps:
                self.field(self.x, sigma, is_shared)

    def decode(self) -> None:
        """Decode as many latents as a rollout ends with."""
        for _ in range(self.num_micro_batches):
            self.policy.model.decode(self.x)

    def reward(self) -> None:
        """Score all images of an iteration, or of clips the frames that are shown."""
        module = self.policy.reward
        if module.frames is not None and self.images.ndim == 5:
            attempt(module.reward, Clips(self.images, module.frames), self.prompts)
        else:
            module.reward(self.images, self.prompts)

    def update(self) -> None:
        """Evaluate trained steps forwards and backwards."""
        for _ in range(self.num_micro_batches * self.policy.plan.inner_epochs):
            for sigma, is_shared in self.trained_steps:
                velocity = self.field(self.x, sigma, is_shared)
                velocity.backward(torch.ones_like(velocity))
        for parameter in self.policy.parameters():
            parameter.grad = None

    @torch.no_grad()
    def reference(self) -> None:
        """Evaluate the reference at trained steps, where there is a penalty."""
        if self.policy.algorithm.penalty.beta:
            for _ in range(self.num_micro_batches * self.policy.plan.inner_epochs):
                for sigma, is_shared in self.trained_steps:
                    self.ref_field(self.x, sigma, is_shared)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Return the loops by name."""
        names = ("rollout", "decode", "reward", "update", "reference")
        return {name: getattr(self, name) for name in names}


class Alternate(Callback):
    """The callback that times the bare parts before every iteration, and then the iteration."""

    def __init__(self) -> None:
        self.bare: list[dict[str, float]] = []
        self.whole: list[float] = []
        self.laps: list[dict[str, float]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch
        parts = BareParts(pl_module, batch)
        self.bare.append({name: seconds(part) for name, part in parts.parts().items()})
        wait_for_gpu()
        self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        wait_for_gpu()
        self.whole.append(time.perf_counter() - self.start)
        self.laps.append(dict(pl_module.last_metrics))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Now, since Lightning moves the network to the CPU when training ends.
        self.peak = peak_memory_gib()
        self.flops = model_flops(BareParts(pl_module, self.batch))
        self.best = matmul_flops(pl_module.transformer.dtype, pl_module.device)


def seconds(part: Callable[[], object]) -> float:
    """Time a call, and what it left for the GPU to do."""
    wait_for_gpu()
    start = time.perf_counter()
    part()
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu() -> None:
    """Wait until the GPU, where there is one, has nothing left to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measure floating-point operations per second, of the best of ten large matrix products."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(10))


@torch.compiler.set_stance("force_eager")  # compiled blocks cannot be counted
def flops_per_row(parts: BareParts) -> dict[str, int]:
    """Count floating-point operations on one sample, of one velocity and of decoding; recomputation
    is left out.
    """
    policy = parts.policy
    transformer: Any = policy.transformer
    x = parts.x[:1]
    one = parts.group.conditioning()[:1]
    transformer.disable_gradient_checkpointing()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        policy.velocity(x, 0.5, one)
    with FlopCounterMode(display=False) as both:
        velocity = policy.velocity(x, 0.5, one)
        velocity.backward(torch.ones_like(velocity))
    with FlopCounterMode(display=False) as reference:
        policy.reference.velocity(x, 0.5, one)
    with FlopCounterMode(display=False) as decode:
        policy.model.decode(x)
    if parts.is_checkpointed:
        transformer.enable_gradient_checkpointing()
    for parameter in policy.parameters():
        parameter.grad = None
    counts = {"rollout": forward, "update": both, "reference": reference, "decode": decode}
    return {name: count.get_total_flops() for name, count in counts.items()}


def model_flops(parts: BareParts) -> dict[str, float]:
    """Count floating-point operations of each bare part of an iteration that runs a network."""

    def rows(is_shared: bool) -> int:
        """Count the rows that reach the network, of which equal ones are evaluated once."""
        seen: list[int] = []

        def count(x: torch.Tensor, sigma: float, conditioning: Any) -> torch.Tensor:
            seen.append(len(x))
            return x

        parts.group.field(count)(parts.x, 0.5, is_shared)
        return seen[0]

    trained = parts.trained_steps * parts.policy.plan.inner_epochs
    has_reference = parts.policy.algorithm.penalty.beta != 0
    steps = {
        "rollout": parts.rollout_steps,
        "update": trained,
        "reference": trained if has_reference else [],
    }
    count = {is_shared: rows(is_shared) for is_shared in (False, True)}
    num_rows = {}
    for name, pairs in steps.items():
        num_rows[name] = sum(count[is_shared] for _, is_shared in pairs)
    num_rows["decode"] = len(parts.x)
    cost = flops_per_row(parts)
    return {name: float(parts.num_micro_batches * cost[name] * num_rows[name]) for name in cost}


def report_utilisation(alternate: Alternate, num_samples: int, bare: dict[str, float]) -> None:
    """Print how much of a large matrix product's speed the networks reach, and images per second of
    the two phases.

    A phase of the run is all it does: rollouts decode and wait for the last rewards, updates ask
    the reference.
    """
    flops = alternate.flops
    best = alternate.best
    print(f"a large matrix product            {best / 1e12:.3g} TFLOP/s")
    laps_of = {"rollout": ("rollout", "reward"), "update": ("update",)}
    parts_of = {"rollout": ("rollout", "decode"), "update": ("update", "reference")}
    for name in laps_of:
        took = statistics.median(
            sum(lap[f"perf/{phase}_seconds"] for phase in laps_of[name])
            for lap in alternate.laps[1:]
        )
        whole = sum(flops[part] for part in parts_of[name])
        print(
            f"{name}: {num_samples / took:.2f} images/s, model FLOP utilisation "
            f"{flops[name] / bare[name] / best:.1%} bare, {whole / took / best:.1%} in the run"
        )


def fit(overrides: list[str], num_iterations: int, callbacks: list[Callback]) -> Policy:
    """Train for some iterations, with nothing evaluated or written."""
    quieten()
    settings = ["name=benchmark", "logger=none", f"num_iterations={num_iterations}"]
    settings += ["evaluation.max_prompts=1", "embeddings.folder=null"]
    cfg = compose([*settings, *overrides])
    policy, data, _ = build(cfg)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(policy, datamodule=data)
    return policy


def time_table(overrides: list[str], num_iterations: int) -> None:
    """Print what an iteration takes, and the share of its bare parts."""
    alternate = Alternate()
    policy = fit(overrides, num_iterations + 1, [alternate])
    # The first one warms up.
    bare = alternate.bare[1:]
    whole = alternate.whole[1:]
    laps = alternate.laps[1:]
    median = {name: statistics.median(row[name] for row in bare) for name in bare[0]}
    total = statistics.median(whole)
    ratio = statistics.median(w / sum(b.values()) for w, b in zip(whole, bare, strict=True))
    rollout = statistics.median(
        # Scoring runs beside the rollout, so the two have one time.
        (lap["perf/rollout_seconds"] + lap["perf/reward_seconds"])
        / (b["rollout"] + b["decode"] + b["reward"])
        for lap, b in zip(laps, bare, strict=True)
    )
    print(
        f"{num_iterations} iterations of {policy.plan.num_samples} images, "
        f"{torch.get_num_threads()} threads; medians"
    )
    print(f"{'part':<34}{'seconds':>9}{'share':>8}")
    for name, value in median.items():
        print(f"{'bare ' + name:<34}{value:>9.3f}{value / total:>8.1%}")
    print(
        f"{'everything else':<34}{total - sum(median.values()):>9.3f}"
        f"{1 - sum(median.values()) / total:>8.1%}"
    )
    print(f"{'iteration':<34}{total:>9.3f}{1:>8.0%}")
    print(f"images per second                 {policy.plan.num_samples / total:.1f}")
    print(f"iteration over bare parts         {ratio:.3f}")
    print(f"rollout with scoring over bare    {rollout:.3f}")
    print(f"peak memory                       {alternate.peak:.2f} GiB")
    report_utilisation(alternate, policy.plan.num_samples, median)


def memory_table(overrides: list[str]) -> None:
    """Print the peak memory for several numbers of steps and group sizes."""
    print(f"{'steps':>6}{'group':>6}{'peak GiB':>10}")
    for num_steps, group_size in ((6, 12), (12, 12), (24, 12), (6, 24), (6, 48)):
        case = [f"rollout.num_steps={num_steps}", f"batch.group_size={group_size}"]
        command = [sys.executable, __file__, "--one-memory-case", *overrides, *case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak = done.stdout.split()[-1]
        print(f"{num_steps:>6}{group_size:>6}{float(peak):>10.3f}", flush=True)


def main() -> None:
    """Print the table that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="configuration overrides, as for train.py")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one-memory-case", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.one_memory_case:
        fit(args.overrides, 2, [])
        print(peak_memory_gib())
    elif args.memory:
        memory_table(args.overrides)
    else:
        time_table(args.overrides, args.iterations)


if __name__ == "__main__":
    raise SystemExit(run_program(main, computes=True))
