"""Scores that come while the next images are drawn, from here or from a server: the same run, with
less waiting.
"""

import threading
import time
from concurrent.futures import Future

import pytest
import torch
from lightning import Trainer
from runs import fit, make
from servers import answering, remote, scorer

from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.stop import Stop
from flowrl.rewards.mixture import Mixture
from flowrl.rewards.shapes import ShapesReward
from flowrl.training.reward import TooManyMissingRewards

SMALL = ("batch.max_micro_batch=2", "num_iterations=2", "num_threads=1")
QUICK = (
    "reward=remote",
    "reward.batch_size=2",
    "reward.client.backoff=0.05",
    "reward.client.timeout=5",
)


def training(policy, data):
    """Metrics of each iteration, without its times."""
    rows = []
    policy.report = rows.append
    fit(policy, data)
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows
    ]


@pytest.fixture(scope="module")
def here():
    """The metrics of a run that scores in process."""
    return training(*make(*SMALL)[:2])


def afterwards(policy):
    """Score in the caller instead, when the result is asked for."""

    class Later(Future):
        def __init__(self, work):
            super().__init__()
            self.work = work

        def result(self, timeout=None):
            return self.work()

    policy.reward.submit = lambda images, prompts, **_: Later(
        lambda: policy.reward.score(images, prompts)
    )


def test_scoring_beside_the_rollout_changes_nothing(here):
    """The metrics, of updates too, are bitwise those of scoring afterwards. Mutation: join in order
    of arrival.
    """
    policy, data, _ = make(*SMALL)
    afterwards(policy)
    assert training(policy, data) == here


def test_scoring_starts_as_soon_as_a_micro_batch_is_decoded():
    """Mutation: score only once all rollouts are done."""
    policy, data, _ = make(*SMALL, "num_iterations=1")
    events, reward, sample = [], policy.reward.reward, policy.sample

    def noting(images, prompts):
        events.append("scored")
        return reward(images, prompts)

    def slowly(batch, rows, stochastic):
        part = sample(batch, rows, stochastic)
        time.sleep(0.05)
        events.append("drawn")
        return part

    policy.reward.reward, policy.sample = noting, slowly
    fit(policy, data)
    assert events == ["scored", "drawn"] * 4


def test_a_failed_call_of_many_costs_its_own_samples():
    """One of four micro-batches: a quarter is missing, and the statistics are those of the rest.

    Mutation: mark the whole iteration missing, or count a failed score as 0.
    """
    policy, data, _ = make(*SMALL, "max_missing=0.25")
    reward, calls = policy.reward.reward, []

    def touchy(images, prompts):
        if len(prompts) == 1:  # the halves of a micro-batch that failed
            raise RuntimeError("out of memory")
        calls.append(reward(images, prompts))
        if len(calls) % 4 == 2:
            raise RuntimeError("out of memory")
        return calls[-1]

    policy.reward.reward = touchy
    rows = training(policy, data)
    for i, row in enumerate(rows):
        assert row["reward/missing"] == 0.25
        left = torch.cat([calls[4 * i + k].values for k in (0, 2, 3)])
        assert row["reward/mean"] == pytest.approx(left.mean().item(), abs=1e-6)
        assert row["reward/std"] == pytest.approx(left.std(correction=0).item(), abs=1e-6)


def test_a_remote_reward_trains_like_the_same_one_here(here):
    """But for the rounding of images to 8 bits. Mutation: lose a part, or the order of the
    requests.
    """
    with answering(scorer(ShapesReward(score="soft"))) as url:
        policy, data, _ = make(*SMALL, *QUICK, f"reward.url={url}")
        there = training(policy, data)
    assert [row.keys() for row in here] == [row.keys() for row in there]
    for one, other in zip(here, there, strict=True):
        for name in ("reward/mean", "reward/std", "reward/part/strict", "reward/missing"):
            assert other[name] == pytest.approx(one[name], abs=0.1), name


def test_a_server_that_restarts_costs_nothing_but_time(here):
    """Away for half a second in the middle of the run, on the same port after. Mutation: no retry
    of a refused call.
    """
    asked, away = [], threading.Event()
    inner = scorer(ShapesReward(score="soft"))

    def behave(handler, body):
        asked.append(1)
        if len(asked) == 3:
            away.set()
            handler.close_connection = True
            handler.connection.close()
        elif not away.is_set():
            inner(handler, body)

    first = answering(behave)
    url = first.__enter__()
    second = answering(inner, port=int(url.rsplit(":", 1)[1]))

    def restart():
        away.wait(60)
        first.__exit__(None, None, None)
        time.sleep(0.5)
        second.__enter__()

    thread = threading.Thread(target=restart)
    thread.start()
    policy, data, _ = make(*SMALL, *QUICK, "reward.client.retries=8", f"reward.url={url}")
    rows = training(policy, data)
    thread.join()
    second.__exit__(None, None, None)
    assert [row["reward/missing"] for row in rows] == [0, 0]
    assert rows[1]["reward/mean"] == pytest.approx(here[1]["reward/mean"], abs=0.1)


def test_a_server_that_stays_away_stops_the_run_and_says_why():
    """Before any update, so that the weights are those of the last iteration. Mutation: train on
    the samples left.
    """
    with answering(scorer(ShapesReward(score="soft"))) as url:
        pass
    absent = ("reward.client.retries=1", "reward.client.start_seconds=null", f"reward.url={url}")
    policy, data, _ = make(*SMALL, *QUICK, *absent)
    before = {name: value.detach().clone() for name, value in policy.tuning.parameters().items()}
    with pytest.raises(
        TooManyMissingRewards, match=rf"100%.*max_missing=20%; the first: {url}/score: .*2 tries"
    ):
        fit(policy, data)
    assert all(
        torch.equal(before[name], value) for name, value in policy.tuning.parameters().items()
    )


def test_a_mixture_scores_its_remote_terms_beside_its_own():
    """One term here, one behind a server; a monitor behind a dead one changes nothing.

    Mutation: send only single rewards to the background.
    """
    with answering(scorer(ShapesReward(score="clean"))) as dead:
        pass
    with answering(scorer(ShapesReward(score="clean"))) as url:
        own, here, gone = ShapesReward(score="soft"), remote(url), remote(dead, retries=0)
        rewards = {"correct": own, "clean": here, "gone": gone}
        policy, data, _ = make(*SMALL, "num_iterations=1")
        policy.reward.reward = Mixture(
            rewards=rewards, weights={"correct": 1.0, "clean": 1.0, "gone": 0.0}
        )
        (row,) = training(policy, data)
    assert row["reward/missing"] == 0 and "reward/part/gone" not in row
    assert row["reward/mean"] == pytest.approx(
        row["reward/part/correct"] + row["reward/part/clean"], abs=1e-5
    )
    assert row["reward/part/clean"] == pytest.approx(
        row["reward/part/correct_clean_objects"], abs=0.05
    )


def test_a_prompt_that_the_scorer_cannot_read_is_named(tmp_path):
    """Before training, by the evaluation of its own prompts. Mutation: evaluate other captions
    instead.
    """
    (tmp_path / "prompts.txt").write_text("a red circle\na photo of a cow\n")
    policy, _, evaluator = make(
        "data=text", f"data.prompts.path={tmp_path}/prompts.txt", "num_threads=1"
    )
    with pytest.raises(
        TooManyMissingRewards, match=r"50%.*'a photo of a cow' is outside the shapes grammar"
    ):
        evaluator.evaluate(policy)


def test_a_run_that_an_evaluation_stops_keeps_its_last_iteration(tmp_path):
    """The checkpoint and the row of the iteration that had been trained, once the optimizer has its
    state.

    Mutation: save without the row, or an optimizer that has not been restored.
    """
    policy, _, _ = make("num_threads=1")
    record = RunRecord(folder=str(tmp_path))
    saver = Checkpoint(record=record, stop=Stop(), folder=str(tmp_path), every=100, keep=1)
    policy.num_iterations, policy.last_metrics = 1, {"iteration": 1, "reward/mean": 0.5}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.optimizers = [policy.configure_optimizers()]
    saver.on_exception(trainer, policy, TooManyMissingRewards("the server is gone"))
    assert not (tmp_path / "checkpoints").exists()
    saver.on_train_start(trainer, policy)
    saver.on_exception(trainer, policy, TooManyMissingRewards("the server is gone"))
    assert (tmp_path / "checkpoints" / "000001" / "state.json").is_file()
    assert (tmp_path / "metrics.csv").read_text().split() == ["iteration,reward/mean", "1,0.5"]
