import math
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from flowrl.training.reward import RewardModule, TooManyMissingRewards
from flowrl.types import Prompt, RewardOutput

IMAGES, PROMPTS = torch.zeros(4, 3, 2, 2), [Prompt(str(i)) for i in range(4)]


class Fixed:
    """A scorer that returns what it was given, or raises it."""

    def __init__(self, result):
        self.result = result

    def __call__(self, images, prompts):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def score(result):
    return RewardModule(reward=Fixed(result), max_missing=0.25).score(IMAGES, PROMPTS)


def output(values, is_valid=None):
    return RewardOutput(
        torch.tensor(values), torch.tensor([True] * len(values) if is_valid is None else is_valid)
    )


@pytest.mark.parametrize(
    "result",
    [RuntimeError("server is down"), output([1.0, 2.0, 3.0]), output([1.0] * 5), None, "0.5"],
)
def test_a_failed_call_marks_all_missing(result, caplog):
    """Exception, wrong length, not a reward at all. Mutation: pad, or score 0 as valid, or stay
    silent.
    """
    got = score(result)
    assert got.is_valid.tolist() == [False] * 4
    assert got.values.tolist() == [0] * 4
    assert "reward failed on 4 images" in caplog.text


def test_values_that_are_no_numbers_are_missing():
    """Mutation: nan_to_num, or trust the scorer's own is_valid."""
    got = score(output([0.5, math.nan, -math.inf, 2.0], [True, True, True, False]))
    assert got.is_valid.tolist() == [True, False, False, False]
    assert got.values.tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize("absurd", [3e38, -3e38, 1.1e12, math.inf])
def test_absurd_values_are_missing(absurd):
    """The squares of 3e38 are infinite, and so are the metrics made of them; 1e12 is the last that
    counts.

    A part that is absurd is left out, and its sample is not. Mutation: ask for finite numbers, or
    bound the values and not the terms of a mixture.
    """
    values = torch.tensor([absurd, 0.5, 1e12, -1e12])
    whole = score(RewardOutput(values, torch.ones(4, dtype=torch.bool), {"soft": values}))
    assert whole.is_valid.tolist() == [False, True, True, True]
    assert "beyond 1e+12" in whole.info[0]["missing"] and "missing" not in whole.info[1]
    assert whole.parts["soft"].isnan().tolist() == [True, False, False, False]
    terms = torch.stack([values, -values], 1)
    mixed = RewardOutput(
        torch.zeros(4), torch.ones(4, dtype=torch.bool), terms=terms, weights=(1.0, 1.0)
    )
    assert score(mixed).is_valid.tolist() == [False, True, True, True]


@pytest.mark.parametrize("parts", [{"soft": torch.zeros(3)}, {"soft": torch.zeros(4, 2)}])
def test_parts_of_the_wrong_length_never_get_through(parts):
    """Parts are indexed by sample afterwards. Mutation: check the values only."""
    result = SimpleNamespace(
        values=torch.ones(4), is_valid=torch.ones(4, dtype=torch.bool), parts=parts, info=()
    )
    assert score(result).is_valid.tolist() == [False] * 4


def test_too_many_missing_stop_the_run():
    """A quarter may fail, more may not. Mutation: >= for >, or compare the valid share."""
    module, terms = RewardModule(reward=Fixed(None), max_missing=0.25), torch.zeros(4, 1)
    module.check(torch.tensor([True, True, True, False]), terms)
    with pytest.raises(TooManyMissingRewards, match=r"50%.*2 of 4.*max_missing=25%"):
        module.check(torch.tensor([True, True, False, False]), terms)


@pytest.mark.parametrize(
    ("count", "limit"), [(10, 0.1), (100, 0.29), (30, 0.1), (100, 0.07), (3, 1 / 3), (4, 0.0)]
)
def test_exactly_max_missing_is_allowed(count, limit):
    """1 - 0.9 in float32 is above 0.1, and 0.29 times 100 is below 29. Mutation: compare either of
    these.
    """
    module, terms = RewardModule(reward=Fixed(None), max_missing=limit), torch.zeros(count, 1)
    most = round(limit * count)
    module.check(torch.arange(count) >= most, terms)
    with pytest.raises(TooManyMissingRewards, match=f"{most + 1} of {count}"):
        module.check(torch.arange(count) > most, terms)


def test_samples_that_no_reward_judges_do_not_dilute_the_share():
    """Both judged ones of eight failed, the first by one of two rewards. With nothing judged,
    nothing is missing.

    Mutation: divide by all samples, or by those that every reward judges.
    """
    module = RewardModule(reward=Fixed(None), max_missing=0.5)
    terms = torch.full((8, 2), math.nan)
    module.check(torch.ones(8).bool(), terms)
    terms[0], terms[1, 0] = 0.0, 0.0
    module.check(torch.arange(8) > 0, terms)
    with pytest.raises(TooManyMissingRewards, match=r"100%.*2 of 2"):
        module.check(torch.arange(8) > 1, terms)


def test_the_message_tells_the_first_reason():
    """A scorer's own words for a sample, an exception's text, or that there was no number.

    Mutation: drop the reasons on the way, so that the user learns only how many are missing.
    """
    good, bad = (
        torch.tensor([True] * 3 + [False]),
        [{}, {}, {}, {"missing": "prompt 'x' is outside the grammar"}],
    )
    cases = {
        "outside the grammar": RewardOutput(torch.ones(4), good, {}, bad),
        "ConnectionError: no route to host": ConnectionError("no route to host"),
        "the reward gave no number": output([0.5, math.nan, 0.5, 0.5]),
    }
    for words, result in cases.items():
        module = RewardModule(reward=Fixed(result), max_missing=0.0)
        got = module.score(IMAGES, PROMPTS)
        with pytest.raises(TooManyMissingRewards, match=words):
            module.check(got.is_valid, got.terms, got.info)


class Recording:
    """Scores an image by its first pixel once it may; fails where the pixel is 9, and notes who
    calls when.
    """

    def __init__(self):
        self.calls, self.now, self.most = [], 0, 0
        self.may = threading.Event()

    def __call__(self, images, prompts):
        self.now += 1
        self.most = max(self.most, self.now)
        self.calls.append((threading.current_thread(), [prompt.text for prompt in prompts]))
        assert self.may.wait(10)
        time.sleep(0.01)
        self.now -= 1
        if images[0, 0, 0, 0] == 9:
            raise RuntimeError("out of memory")
        return output(images[:, 0, 0, 0].tolist())


def test_scores_come_in_the_order_asked_for_and_a_failed_call_costs_its_own_samples():
    """In the background, one call at a time, of which two wait at most. Mutation: score in the
    caller, in parallel, or in the order of arrival; or let any number wait.
    """
    reward = Recording()
    module = RewardModule(reward=reward, max_missing=1.0)

    def submit(number):
        return module.submit(torch.full((2, 3, 2, 2), float(number)), [Prompt(f"{number}")] * 2)

    submitted = [submit(1), submit(9)]
    assert not reward.may.is_set()  # nothing has been scored
    # Where two wait, a third is kept until the first is scored.
    threading.Timer(0.2, reward.may.set).start()
    submitted.append(submit(3))
    assert reward.may.is_set() and submitted[0].done()
    got = module.collect([submitted[2], submitted[0], submitted[1]])
    assert (
        got.values.tolist() == [3, 3, 1, 1, 0, 0]
        and got.is_valid.tolist() == [True] * 4 + [False] * 2
    )
    assert got.terms.tolist() == [[3], [3], [1], [1], [0], [0]]
    assert "out of memory" in got.info[5]["missing"]
    assert reward.most == 1 and [texts[0] for _, texts in reward.calls] == ["1", "9", "9", "9", "3"]
    assert all(
        thread is not threading.main_thread() and thread.daemon for thread, _ in reward.calls
    )


@pytest.mark.parametrize(
    ("device", "only_computes", "is_called_here"),
    [("cpu", True, True), ("cpu", False, False), ("meta", True, False)],
)
def test_a_scorer_that_only_computes_takes_turns_with_a_rollout_on_the_cpu(
    device, only_computes, is_called_here
):
    """Beside it the two would take each other's cores. Mutations: never, on every device, or for a
    scorer that may wait.
    """
    reward = Recording()
    reward.only_computes = only_computes
    module = RewardModule(reward=reward, max_missing=1.0).to(torch.device(device))
    threading.Timer(0.2, reward.may.set).start()
    score = module.submit(IMAGES, PROMPTS)
    assert score.done() == reward.may.is_set() == is_called_here
    assert module.collect([score]).is_valid.all()
    ((thread, _),) = reward.calls
    assert (thread is threading.main_thread()) == is_called_here


class Mean:
    """Each image's mean; notes the prompts of every call. Fails at a prompt called "bad"."""

    weights = (1.0,)

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts):
        self.calls.append([prompt.text for prompt in prompts])
        if "bad" in self.calls[-1]:
            raise KeyError("no such key")
        return output(images.mean((1, 2, 3)).tolist())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_costs_itself_alone(value):
    """Seven of eight are scored, in one call, each beside its own prompt; with none finite nothing
    is asked.

    Mutation: show the scorer all, lose the order, ask once for each image, or look for NaN alone.
    """
    reward = Mean()
    module = RewardModule(reward=reward, max_missing=0.2)
    images, prompts = (
        torch.arange(8.0).view(8, 1, 1, 1).repeat(1, 3, 2, 2) / 8,
        [Prompt(f"{i}") for i in range(8)],
    )
    images[3, 0, 0, 0] = value
    got = module.score(images, prompts)
    assert got.is_valid.tolist() == [True] * 3 + [False] + [True] * 4
    assert got.values.tolist() == [0, 0.125, 0.25, 0, 0.5, 0.625, 0.75, 0.875]
    assert got.terms[:, 0].tolist() == got.values.tolist()
    assert [bool(entry) for entry in got.info] == [False] * 3 + [True] + [False] * 4
    assert got.info[3] == {"missing": "image is not finite"}
    assert reward.calls == [["0", "1", "2", "4", "5", "6", "7"]]
    module.check(got.is_valid, got.terms, got.info)  # an eighth is below a fifth
    assert (
        not module.score(torch.full((2, 3, 2, 2), value), prompts[:2]).is_valid.any()
        and len(reward.calls) == 1
    )


def test_images_whose_sum_is_not_finite_may_be(caplog):
    """Mutation: look at the sum alone."""
    module = RewardModule(reward=Fixed(output([0.5] * 4)), max_missing=0.0)
    got = module.score(torch.full_like(IMAGES, 3e38), PROMPTS)
    assert got.values.tolist() == [0.5] * 4
    assert not caplog.records


def test_a_scorer_that_hangs_is_given_up():
    """After scorer_timeout its call is missing and says so; calls while it hangs are missing at
    once, and never overlap it; once it has ended, scores come again.

    Mutation: wait for ever, wait as long for every call, or ask a scorer that is not thread-safe
    twice at a time.
    """
    reward = Recording()
    module = RewardModule(reward=reward, max_missing=0.0, scorer_timeout=0.3)
    ones = torch.ones(2, 3, 2, 2)
    start = time.monotonic()
    got = module.collect([module.submit(ones, PROMPTS[:2]) for _ in range(3)])
    assert 0.3 <= time.monotonic() - start < 2 and not got.is_valid.any() and len(reward.calls) == 1
    with pytest.raises(
        TooManyMissingRewards, match=r"Recording gave no scores within scorer_timeout=0.3 s"
    ):
        module.check(got.is_valid, got.terms, got.info)
    assert (
        "Recording, asked 0 s ago, is busy" in got.info[4]["missing"]
        and "Recording" in module.waits_for()
    )
    reward.may.set()
    module.running.result(5)
    assert module.waits_for() is None and module.score(ones, PROMPTS[:2]).values.tolist() == [1, 1]


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_scorer_timeout_is_above_0(seconds):
    """Mutation: >= for >, or a comparison that NaN passes."""
    with pytest.raises(ValueError, match=f"scorer_timeout={seconds}"):
        RewardModule(reward=Fixed(None), max_missing=0.0, scorer_timeout=seconds)


def test_a_network_scorer_is_frozen():
    """Mutation: leave gradients or dropout on."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    RewardModule(reward=network, max_missing=0.0)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_max_missing_is_a_share(share):
    """Mutation: drop the check."""
    with pytest.raises(ValueError, match=f"max_missing={share}"):
        RewardModule(reward=Fixed(None), max_missing=share)


def test_nothing_to_judge_is_told_from_nothing_known():
    """A NaN is missing where the reward applies, and expected where it does not. Mutation: treat
    both alike.
    """
    applies = torch.tensor([[True], [False], [True], [False]])
    got = score(
        RewardOutput(
            torch.tensor([0.5, math.nan, math.nan, 7.0]), torch.ones(4).bool(), applies=applies
        )
    )
    assert got.is_valid.tolist() == [True, True, False, True]
    assert got.has_value.tolist() == [True, False, False, False]
    assert got.values[[0, 2]].tolist() == [0.5, 0] and got.values[[1, 3]].isnan().all()


def test_a_reward_that_never_applies_stops_the_run():
    """One empty iteration may come by chance. Mutation: train on nothing, in silence, stop at the
    first, or count empty iterations that one with a reward lies between.
    """
    module = RewardModule(reward=Fixed(None), max_missing=0.0)
    nothing = torch.full((2, 1), math.nan)
    for terms in (nothing, torch.tensor([[math.nan], [2.0]]), *[nothing] * 4):
        module.check_applies(terms)
    with pytest.raises(ValueError, match="applied to no prompt of 5"):
        module.check_applies(nothing)
