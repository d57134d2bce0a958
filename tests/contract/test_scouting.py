"""What scouting promises: kept candidates come again bitwise, all that is drawn of them is that of
their own number, and what does not go together is refused in one line.
"""

import logging
from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf
from runs import composed, fit, make
from test_rehearsal import rows_of

from flowrl.callbacks import rehearsal
from flowrl.callbacks.rehearsal import Rehearse, rehearse
from flowrl.errors import UserError
from flowrl.launch.build import prepare
from flowrl.launch.checks import check_amounts
from flowrl.noise import FORWARD, INITIAL, gaussian_noise
from flowrl.objectives.forward import ForwardObjective
from flowrl.training import policy as policy_module
from flowrl.training import sampling
from flowrl.training.best_worst import BestWorst, Kept
from flowrl.training.memory import OutOfMemory
from flowrl.training.metric_means import Clock, Record
from flowrl.training.reward import TooManyMissingRewards
from flowrl.training.sampling import sample_update
from flowrl.training.scouting import Scouting
from flowrl.types import RewardOutput

SCOUTED = ("num_threads=1", "scouting=best_worst", "scouting.candidates=8")
"""Two prompts with 8 candidates each, of which 4 are kept, in micro-batches of 4."""
FULL = ("scouting.num_steps=6", "batch.max_micro_batch=4", "num_iterations=1")
"""Candidates that take all steps of a rollout."""
OWN_NOISE = "rollout.shared_initial_noise=false"
SHARE = ("sampler=cps", "steps=all_but_last", "trained=random_share", "loss=grpo", OWN_NOISE)
METHODS = {
    "noise in four steps": ("sampler=cps", "steps.count=4", "loss=grpo", OWN_NOISE),
    "deterministic": ("experiment=diffusion_nft",),
}


def drawn(policy, data):
    """What an iteration draws: states, by prompt and number, of the candidates and of what is
    trained on; images likewise; and its micro-batches.
    """
    batch = data.iterations[0]
    images = {}
    decode = policy.model.decode
    members = []

    def decoded(x0):
        pictures = decode(x0)
        names = members.pop(0)
        images.update(zip(names, zip(x0, pictures, strict=True), strict=True))
        return pictures

    policy.model.decode = decoded
    [micro_batches] = policy.scouting.candidates.updates(0)
    members += [[policy.scouting.candidates.member(row) for row in rows] for rows in micro_batches]
    with policy.objective.at_behaviour():
        policy.scouting.scout(policy, batch, Record(), Clock())
        scouted, images = images, {}
        updates = policy.plan.updates(0)
        members += [[policy.scouting.member(row) for row in rows] for up in updates for rows in up]
        parts = [
            part
            for number, rows in enumerate(updates)
            for part in sample_update(policy, batch, number, rows)
        ]
    return scouted, images, parts


@pytest.mark.parametrize("method", METHODS)
def test_a_kept_candidate_comes_again_bitwise(method):
    """Latents and images of all that is trained on are those of the candidates with the same
    numbers, though they stand in other rows of other micro-batches.

    Mutation: draw the place in the group, or other noise in the steps.
    """
    policy, data, _ = make(*SCOUTED, *FULL, *METHODS[method])
    scouted, again, parts = drawn(policy, data)
    assert len(scouted) == 16 and len(again) == 8 and again.keys() < scouted.keys()
    assert set(again) == {(p, n) for p in (0, 1) for n in policy.scouting.kept[p].numbers}
    assert any(number >= 4 for _, number in again), "beyond the places of the group"
    for member, (x0, image) in again.items():
        assert torch.equal(x0, scouted[member][0]) and torch.equal(image, scouted[member][1])
    # The rewards are those of the scores, and so is their order.
    scores = policy.scouting.scores
    rewards = policy.reward.collect([part.score for part in parts]).values.tolist()
    expected = [scores[p][n] for p in (0, 1) for n in policy.scouting.kept[p].numbers]
    assert rewards == expected


def test_candidates_of_fewer_steps_begin_from_the_noise_of_what_is_drawn_again(monkeypatch):
    """Four deterministic steps of a method with noise: only initial noise is drawn, of each
    candidate its own, and the kept ones' is drawn again for what is trained on.

    Mutation: draw noise in candidates' steps, or count their initial noise by the row.
    """
    policy, data, _ = make(*SCOUTED, "scouting.num_steps=4", *METHODS["noise in four steps"])
    asked = []
    draw = sampling.gaussian_noise

    def noted(shape, *, seed, iteration, samples, step):
        asked.append((step, tuple(samples)))
        return draw(shape, seed=seed, iteration=iteration, samples=samples, step=step)

    monkeypatch.setattr(sampling, "gaussian_noise", noted)
    _, again, _ = drawn(policy, data)
    [micro_batches] = policy.scouting.candidates.updates(0)
    first = asked[: len(micro_batches)]
    everyone = [(prompt, number) for prompt in (0, 1) for number in range(8)]
    assert [member for _, members in first for member in members] == everyone
    assert {step for step, _ in first} == {INITIAL}
    rest = asked[len(micro_batches) :]
    assert len({step for step, _ in rest}) == 5, "the initial one and those of four steps"
    assert {member for _, members in rest for member in members} == set(again)


class Given:
    """A scorer with scores made up by hand, one list a call of an iteration; None is missing."""

    def __init__(self, *scores):
        self.scores = [score for of_round in scores for score in of_round]

    def __call__(self, images, prompts):
        taken, self.scores = self.scores[: len(prompts)], self.scores[len(prompts) :]
        values = torch.tensor([torch.nan if score is None else float(score) for score in taken])
        return RewardOutput(values, ~values.isnan())


CANDIDATES = ([3, 1, 4, 1, 5, 9, 2, 6], [1, 1, 1, 1, 1, 1, 1, 2])
"""Of the first prompt 5 and 7 are the best and 1 and 3 the worst; of the second 7 and 0 are, and 5
and 6.
"""
AGAIN = ([0, 2, 8, 1], [4, 3, 5, 5])
"""Rewards of numbers 1 3 5 7 and 0 5 6 7, drawn in full."""


def test_rewards_of_what_is_trained_on_make_the_advantages(monkeypatch):
    """Advantages are those of the second rewards alone: of the first prompt -2.75, -.75, 5.25 and
    -1.75 from the mean 2.75, over sqrt(9.6875). The scores of the candidates are in the metrics.

    Of pairs with different scores the first prompt has 5 > 1, 5 > 3, 7 > 1 and a wrong 7 < 3; the
    second 7 > 5 and 7 = 6, where 0 scored no more than its worst: (4 + .5) / 6.

    Mutations: take the scores for the rewards, count the pairs of equal scores, or equal rewards as
    agreement.
    """
    policy, data, _ = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    policy.reward.reward = Given(*CANDIDATES, *AGAIN)
    rows, parts = [], []
    policy.report = rows.append
    assign = policy_module.assign_advantages

    def assigned(policy, batches, record):
        assign(policy, batches, record)
        parts.extend(batches)

    monkeypatch.setattr(policy_module, "assign_advantages", assigned)
    fit(policy, data)
    assert policy.scouting.kept == [Kept((5, 7), (1, 3)), Kept((7, 0), (5, 6))]
    [row] = rows
    advantages = torch.cat([part.advantage for part in parts])
    expected = torch.tensor([-2.75, -0.75, 5.25, -1.75]) / (9.6875**0.5 + 1e-4)
    torch.testing.assert_close(advantages[:4], expected, rtol=1e-5, atol=0)
    assert row["reward/mean"] == 28 / 8
    assert row["scouting/reward_mean"] == (31 + 9) / 16
    assert row["scouting/agreement"] == pytest.approx(4.5 / 6)
    assert row["scouting/constant_groups"] == 0 and row["scouting/missing"] == 0
    assert row["perf/scouting_seconds"] > 0


def test_images_are_counted_with_those_of_scouting():
    """16 candidates and 8 samples an iteration. Mutation: count what is trained on."""
    policy, data, _ = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    fit(policy, data)
    assert policy.scouting.num_drawn == policy.last_metrics["samples"] == 24
    seconds = sum(v for k, v in policy.last_metrics.items() if k.endswith("_seconds"))
    speed = policy.last_metrics["perf/images_per_second"]
    # The laps leave out what comes after the last of them.
    assert 0.5 * 24 / seconds < speed < 24 / seconds
    assert make("num_threads=1")[0].scouting.num_drawn == 8


@pytest.mark.parametrize("scored", [8, 0])
def test_missing_scores_are_told(scored, caplog):
    """The second prompt's candidates have 3 scores, fewer than the 4 that are kept, or none: the
    lowest numbers stand in, and a line says so. Mutation: stay silent.
    """
    policy, data, _ = make(*SCOUTED, *FULL, "max_missing=0.9", *METHODS["deterministic"])
    second = [None, 1, None, None, 2, None, 3, None] if scored else [None] * 8
    policy.reward.reward = Given(CANDIDATES[0], second)
    record = Record()
    with caplog.at_level(logging.WARNING), policy.objective.at_behaviour():
        policy.scouting.scout(policy, data.iterations[0], record, Clock())
    first, other = policy.scouting.kept
    assert first == Kept((5, 7), (1, 3))
    assert other == (Kept((6,), (4, 1), (0,)) if scored else Kept((), (), (0, 1, 2, 3)))
    assert "scouting: 1 prompt of 2 had fewer candidates with a score than are kept" in caplog.text
    assert record.means()["scouting/missing"] == (5 if scored else 8) / 16
    assert record.means()["scouting/constant_groups"] == (0 if scored else 0.5)


def test_too_many_missing_scores_stop_the_run():
    """5 of 16 are above a fifth. Mutation: look at the rewards of what is trained on alone."""
    policy, data, _ = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    policy.reward.reward = Given([None] * 5 + [1, 2, 3], CANDIDATES[1])
    with pytest.raises(TooManyMissingRewards, match=r"31% of the rewards are missing \(5 of 16\)"):
        policy.scouting.scout(policy, data.iterations[0], Record(), Clock())


def test_noise_of_a_forward_loss_is_that_of_the_candidate():
    """Mutation: count it by the place in the group."""
    policy, data, _ = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    policy.reward.reward = Given(*CANDIDATES, *AGAIN)
    _, _, parts = drawn(policy, data)
    assert isinstance(policy.objective, ForwardObjective)
    noise = policy.objective.noise(parts[0], [0, 3], 2, 7)
    expected = gaussian_noise(
        policy.model.latent_shape,
        seed=policy.seed,
        iteration=0,
        samples=[(0, 1), (0, 7)],
        step=FORWARD + 7 * 6 + 2,
    )
    assert torch.equal(noise, expected)


def test_steps_of_a_reverse_loss_are_those_of_the_candidate():
    """A random 3 of the 5 steps with noise. Mutation: draw them by the place in the group."""
    policy, data, _ = make(*SCOUTED, *FULL, *SHARE)
    policy.reward.reward = Given(*CANDIDATES, *AGAIN)
    _, _, parts = drawn(policy, data)
    batch = parts[0]
    share = policy.algorithm.trained
    for place, number in enumerate((1, 3, 5, 7)):
        steps = share.draw((0, 1, 2, 3, 4), 0, policy.seed, 0, number)
        trained = policy.objective._trained(batch)
        assert tuple(k for k in range(6) if place in trained.at(k)) == steps


@pytest.mark.parametrize(
    "method",
    [
        SHARE,
        ("experiment=diffusion_nft", "loss.fraction=0.5"),
    ],
)
def test_a_rehearsal_does_not_choose_what_candidates_train_on(method):
    """It rolls out the first samples before any candidate is chosen, under the same rows; the steps
    or sigmas that were drawn for them must not be those of the candidates.

    Mutation: keep what was drawn by rows.
    """
    results = []
    for is_rehearsed in (False, True):
        policy, data, evaluator = make(*SCOUTED, "scouting.num_steps=4", *method)
        callbacks = [Rehearse(evaluator=evaluator, every=1)] if is_rehearsed else []
        rows = rows_of(policy, data, *callbacks)
        results.append((rows, {k: v.tolist() for k, v in policy.tuning.parameters().items()}))
    assert results[0] == results[1]


def test_a_rehearsal_counts_the_candidates(monkeypatch):
    """Each phase takes a second by a clock that is turned by hand: 4 pieces of candidates, and 2
    micro-batches of a rollout and 6 terms. Mutation: count one piece.
    """
    policy, data, evaluator = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    ticks = iter(range(100))
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(rehearsal, "synchronised", lambda *_, **__: nullcontext())
    policy.manual_backward = lambda loss: loss.backward()
    told = rehearse(policy, data.iterations[0], evaluator)
    assert [phase.what for phase in told.phases][:2] == ["4 candidates", "4 samples"]
    assert told.iteration_seconds == 4 * 1 + 2 * (1 + 6)


def test_memory_that_scouting_lacks_is_told_with_its_name():
    """Mutation: call it the rollout's."""

    def empty(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    policy, data, _ = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    policy.model.decode = empty
    with pytest.raises(OutOfMemory, match=r"in the scouting: set batch\.max_micro_batch=2"):
        fit(policy, data)


def test_a_scorer_of_whole_groups_compares_all_candidates():
    """And then those that are trained on with each other. Mutation: ask it for a group's size."""
    calls = []

    class Rank:
        whole_groups = True

        def __call__(self, images, prompts):
            calls.append(len(prompts))
            brightness = images.mean((1, 2, 3))
            ranks = (brightness[:, None] > brightness[None]).sum(1).float()
            return RewardOutput(ranks, torch.ones(len(prompts), dtype=torch.bool))

    policy, data, _ = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    policy.reward.reward = Rank()
    fit(policy, data)
    assert calls == [8, 8, 4, 4]
    ranks = sorted(policy.scouting.scores[0])
    assert ranks == sorted(set(ranks)) == list(range(8))


def test_a_choice_of_ones_own_keeps_as_many_as_a_group_has():
    """Mutation: train on whatever it keeps."""

    class Twice(BestWorst):
        def choose(self, scores, count):
            return Kept((0, 0), (1, 2))

    policy, data, _ = make(*SCOUTED, *FULL, *METHODS["deterministic"])
    policy.scouting = Scouting(Twice(candidates=8, num_steps=6), policy.plan)
    with pytest.raises(
        UserError, match=r"\[0, 0, 1, 2\] were kept; .* 4 different .* from 0 to 7$"
    ):
        policy.scouting.scout(policy, data.iterations[0], Record(), Clock())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("scouting.candidates=12", OWN_NOISE),
            r"scouting\.candidates=12 must be more than batch\.group_size=12.*scouting=none",
        ),
        (
            ("scouting.num_steps=7", OWN_NOISE),
            r"scouting\.num_steps=7 must be at most rollout\.num_steps=6",
        ),
        (
            ("scouting.num_steps=5",),
            r"scouting\.num_steps=5, below .*shared_initial_noise=true makes equal: set it to "
            r"false, or scouting\.num_steps=6",
        ),
        (
            (
                *("scouting.candidates=13", "batch.prompts_per_iteration=3", OWN_NOISE),
                *("trainer.devices=2", "batch.updates_per_iteration=1"),
            ),
            r"=3 x scouting\.candidates=13 do not split into 2 processes; make them a multiple",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(words, told):
    """In a line, before weights load. Mutation: leave a rule out, or refuse equal numbers."""
    with pytest.raises(UserError, match=told) as error:
        prepare(composed("scouting=best_worst", *words))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("loss", "sampler"), [("draft", "ode"), ("opd", "cps")])
def test_losses_that_compare_nothing_are_not_scouted_for(loss, sampler):
    """Reward gradients and teachers: of one sample a prompt the worst would be kept. Mutation: keep
    extremes for nobody.
    """
    words = (f"loss={loss}", f"sampler={sampler}", OWN_NOISE, "reward=shapes_proxy")
    told = rf"^scouting keeps .* but loss={loss} compares none: set scouting=none$"
    with pytest.raises(UserError, match=told):
        prepare(composed("scouting=best_worst", "batch.group_size=1", *words))


def test_what_goes_together_is_taken():
    """As many steps as the rollouts', whose noise tells candidates of one start apart; and a run of
    an earlier version has no such key. Mutation: refuse shared initial noise at all.
    """
    whole = prepare(composed("scouting=best_worst", "scouting.num_steps=6"))
    assert whole.scouting == BestWorst(candidates=48, num_steps=6)
    cfg = composed()
    assert cfg.scouting is None
    OmegaConf.set_struct(cfg, False)
    del cfg["scouting"]
    assert prepare(cfg).scouting is None


def test_more_candidates_than_can_be_held_are_refused():
    """24 x 50,000 are above a million. Mutation: count the kept ones."""
    with pytest.raises(UserError, match=r"x scouting\.candidates=50000 are 1200000 samples"):
        check_amounts(composed("scouting=best_worst", "scouting.candidates=50000"))


def test_the_plan_tells_what_is_scouted():
    """24 x 48 in 4 steps, of which 12 are kept, in the micro-batches of the rollouts.

    Mutation: describe the trained samples again.
    """
    prepared = prepare(composed("scouting=best_worst", OWN_NOISE))
    lines = Scouting(prepared.scouting, prepared.plan).describe()
    assert lines == [
        "  scouting                  24 prompts x 48 candidates = 1152, in 4 steps, 12 of each "
        "prompt kept",
        "                            1 x 8 of 144 candidates",
    ]
    assert Scouting(None, prepared.plan).describe() == []
