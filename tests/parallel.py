"""Work in 1, 2 or 4 processes of this machine: runs of a few iterations, and what each process
saw.
"""

import hashlib
import os
import socket
import traceback
from dataclasses import dataclass, field

import forks
import torch
from runs import make
from torch import Tensor

SMALL = (
    "num_iterations=3",
    "batch={prompts_per_iteration: 4, group_size: 4}",
    "num_threads=1",
    "optimizer.lr=1e-4",
)
SMALL += ("evaluation.batch_size=3",)  # which splits the two images of a prompt


@dataclass
class Seen:
    """By iteration and row: prompt, hash of the initial noise, reward, advantage; and what is the
    same everywhere.
    """

    rank: int
    prompts: dict = field(default_factory=dict)
    noise: dict = field(default_factory=dict)
    rewards: dict = field(default_factory=dict)
    advantages: dict = field(default_factory=dict)
    metrics: list = field(default_factory=list)
    parameters: dict = field(default_factory=dict)
    start: dict = field(default_factory=dict)
    num_reduces: int = 0
    num_optimizer_steps: int = 0
    evaluation: dict = field(default_factory=dict)
    drawn: dict = field(default_factory=dict)
    candidates: dict = field(default_factory=dict)
    """Hashes of last state and image, by iteration, prompt and number."""
    trained: dict = field(default_factory=dict)
    """Those of what is trained on."""
    delta: float = 0.0


def run(count, *overrides):
    """`count` processes run the same job; what they saw, by rank."""
    return sorted(spawn(_watch, count, overrides), key=lambda own: own.rank)


def spawn(work, count, *arguments):
    """What `count` processes return that call work(rank, count, *arguments) and find each other by
    the environment.
    """
    context = forks.context()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = context.Queue()
    workers = [
        context.Process(target=_work, args=(work, rank, count, port, arguments, queue))
        for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    answers = []
    for _ in workers:
        answers.append(queue.get(timeout=200))
        # The traceback of a process that failed: the others may wait for it.
        if isinstance(answers[-1], str):
            for worker in workers:
                worker.kill()
            raise AssertionError(answers[-1])
    for worker in workers:
        worker.join()
    return answers


def _work(work, rank, count, port, arguments, queue):
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} if count > 1 else {})
    torch.set_num_threads(1)
    try:
        queue.put(work(rank, count, *arguments))
    except Exception:
        queue.put(traceback.format_exc())


def _hash(values):
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _note_states(policy, own):
    """Note the last state and the image of each sample as it is decoded: of candidates, and of what
    is trained on.
    """
    from flowrl.training import sampling, scouting

    decode = policy.model.decode
    latest = []

    def noting(table):
        def drawn(policy, batch, members, *rest):
            conditioned, trajectory = draw_members(policy, batch, members, *rest)
            samples = [(batch.iteration, *member) for member in members]
            latest[:] = [trajectory.x0, table, samples]
            return conditioned, trajectory

        return drawn

    def decoded(x0):
        images = decode(x0)
        # Evaluations decode others, and a floor's rollout is not decoded.
        if latest and latest[0] is x0:
            _, table, samples = latest
            for sample, state, image in zip(samples, x0, images, strict=True):
                table[sample] = (_hash(state), _hash(image))
        return images

    draw_members = sampling.draw_members
    sampling.draw_members = noting(own.trained)
    scouting.draw_members = noting(own.candidates)
    policy.model.decode = decoded


def _watch(rank, count, overrides):  # noqa: C901, one closure for each thing watched
    from lightning import Callback, Trainer

    from flowrl.parallel.sharding import gathered
    from flowrl.parallel.strategies import parts, replicas
    from flowrl.training import policy as module
    from flowrl.training import sampling

    is_divided = "trainer=fsdp" in overrides
    policy, data, evaluator = make(*SMALL, f"trainer.devices={count}", *overrides)
    own = Seen(rank)
    draw, collect, assign, report = (
        sampling.gaussian_noise,
        policy.reward.collect,
        module.assign_advantages,
        policy.report,
    )
    scores: list[Tensor] = []

    def drawn(shape, *, seed, iteration, samples, step):
        noise = draw(shape, seed=seed, iteration=iteration, samples=samples, step=step)
        if step == sampling.INITIAL:
            for sample, values in zip(samples, noise, strict=True):
                own.noise[iteration, sample] = _hash(values)
        return noise

    def collected(futures):
        scores.append((output := collect(futures)).values)
        return output

    def assigned(policy, parts, record):
        assign(policy, parts, record)
        rows = [(part.iteration, row) for part in parts for row in part.rows]
        own.rewards.update(zip(rows, scores[-1].tolist(), strict=True))
        own.advantages.update(
            zip(rows, torch.cat([part.advantage for part in parts]).tolist(), strict=True)
        )
        own.prompts.update(
            zip(rows, [prompt.text for part in parts for prompt in part.prompts], strict=True)
        )

    def reported(values):
        own.metrics.append(
            {name: value for name, value in values.items() if not name.startswith("perf/")}
        )
        report(values)

    def weights():
        whole = gathered(policy.tuning.parameters(), is_kept=True)
        return {name: value.detach().numpy().copy() for name, value in whole.items()}

    class Count(Callback):
        """Counts the all-reduces of gradients: DDP calls its hook once for each."""

        def on_train_start(self, trainer, pl_module):
            own.start = weights()
            if count > 1 and not is_divided:
                trainer.strategy.model.register_comm_hook(None, self.reduce)

        @staticmethod
        def reduce(state, bucket):
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            own.num_reduces += 1
            return allreduce_hook(None, bucket)

        def on_train_end(self, trainer, pl_module):
            result = evaluator.evaluate(policy)
            own.evaluation = dict(result.metrics)
            own.drawn = {name: list(images) for name, images in result.images.items()}

    _note_states(policy, own)
    sampling.gaussian_noise, policy.reward.collect = drawn, collected
    module.assign_advantages, policy.report = assigned, reported
    strategies = {
        "alone": "auto",
        "whole": replicas(timeout_minutes=2, bucket_megabytes=1024),
        "parts": parts(num_processes=count, timeout_minutes=2),
    }
    Trainer(
        accelerator="cpu",
        devices=count,
        strategy=strategies["alone" if count == 1 else "parts" if is_divided else "whole"],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Count()],
    ).fit(policy, datamodule=data)
    own.parameters = weights()
    own.num_optimizer_steps = policy.num_optimizer_steps
    own.delta = getattr(policy.algorithm.loss, "threshold", 0.0)
    return own
