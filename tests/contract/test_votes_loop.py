"""What a run of votes shows to people, which votes it counts, and what it does without enough."""

from types import SimpleNamespace

import pytest
import torch
from ballots import BLUE, GREEN, GREY, RED, fill, plain, vote_on
from lightning import Trainer
from runs import make

from flowrl.callbacks.stop import Stop
from flowrl.callbacks.votes import FollowVotes, votes_in
from flowrl.errors import UserError
from flowrl.rewards.images import to_pictures
from flowrl.rewards.routed import Routed
from flowrl.training.metric_means import Clock, Record
from flowrl.training.reward import RewardModule
from flowrl.training.sampling import sample_update
from flowrl.types import Prompt
from flowrl.votes.files import (
    cast,
    open_pairs,
    picture_path,
    read_pairs,
    read_votes,
    usable_votes,
)
from flowrl.votes.rounds import read_rounds

SAID = [
    (plain(RED), plain(GREEN), "left"),
    (plain(BLUE), plain(RED), "right"),
    (plain(GREY), plain(RED), "right"),
    (plain(BLUE), plain(GREEN), "equal"),
]
METHODS = {
    "completions of each step": ("rollout.credit=step", "steps=all_but_last"),
    "candidates in all steps": ("scouting=best_worst", "scouting.candidates=8"),
    "cheap candidates": ("scouting=best_worst", "scouting.candidates=8", "scouting.num_steps=2"),
}


class Idle(Trainer):
    """A trainer that does nothing but name the data."""

    def __init__(self, data):
        self.datamodule = data


class Course:
    """A run whose reward is votes, of two prompts and two pairs an iteration, without a trainer."""

    def __init__(self, place, *words, said=SAID):
        self.folder = place / "votes"
        self.pairs = fill(self.folder, said) if said else []
        self.policy, data, _ = make(
            *("num_threads=1", "reward=votes", f"reward.folder={self.folder}"),
            *("reward.min_votes=4", "reward.pairs=2", "reward.wait_seconds=0.1"),
            *("rollout.shared_initial_noise=false", "loss=grpo", *words),
        )
        self.told = []
        self.policy.print = self.told.append
        self.scorer = votes_in(self.policy)
        self.iterations = data.iterations
        self.trainer = Idle(data)
        self.follower = FollowVotes(scorer=self.scorer, stop=Stop(), folder=str(place))

    def begin(self):
        self.follower.on_fit_start(self.trainer, self.policy)
        self.follower.on_train_start(self.trainer, self.policy)

    def start(self, number):
        batch = self.iterations[number]
        self.follower.on_train_batch_start(self.trainer, self.policy, batch, number)

    def draw(self, number):
        """An iteration's samples, with all that is drawn beside them."""
        batch = self.iterations[number]
        parts = []
        with self.policy.objective.at_behaviour():
            self.policy.scouting.scout(self.policy, batch, Record(), Clock())
            for update, rows in enumerate(self.policy.plan.updates(0)):
                parts += sample_update(self.policy, batch, update, rows)
        return parts

    def end(self, number):
        self.policy.num_iterations = number + 1
        self.follower.on_train_batch_end(self.trainer, self.policy, None, None, number)


def new_pairs(course, iteration):
    """The pairs of an iteration, as texts and digests of their pictures."""
    pairs = read_pairs(course.folder).values()
    return [(pair.prompt, pair.left, pair.right) for pair in pairs if pair.iteration == iteration]


def first_two(course, parts, folder):
    """The pairs that the samples of each prompt make, as a folder of votes has them."""
    pictures = {}
    for part in parts:
        images = to_pictures(course.policy.model.decode(part.trajectory.x0))
        for row, image in zip(part.rows, images, strict=True):
            pictures[row] = (part.prompts[row - part.rows.start].text, image)
    size = course.policy.plan.group_size
    said = []
    for start in (0, size):
        (text, left), (_, right) = pictures[start], pictures[start + 1]
        assert left.tobytes() != right.tobytes()
        said.append((text, left, right))
    return fill_texts(folder, said)


def fill_texts(folder, said):
    """Digests of pictures, by the prompts' texts."""
    pairs = fill(folder, [(left, right, None) for _, left, right in said])
    return [(text, p.left, p.right) for (text, _, _), p in zip(said, pairs, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_people_are_shown_the_samples_that_are_trained_on(method, tmp_path):
    """And neither completions nor candidates, which are scored too and come first. Mutation: show
    all that is scored.
    """
    course = Course(tmp_path, *METHODS[method])
    course.begin()
    course.start(0)
    parts = course.draw(0)
    course.end(0)
    assert sorted(new_pairs(course, 1)) == sorted(first_two(course, parts, tmp_path / "expected"))
    assert course.policy.reward.viewer is None
    course.draw(1)  # nothing is shown between iterations


def test_people_are_shown_what_the_votes_are_asked_for(tmp_path):
    """Where a route keeps other prompts from them, nobody is to vote on those; nor on images that
    are no numbers. Mutation: draw or show pairs of all prompts, or fail.
    """
    course = Course(tmp_path, "num_iterations=8", said=[])
    chosen = course.iterations[0].prompts[0].family
    route = Routed(reward=course.scorer, key="family", values=[chosen])
    course.policy.__dict__["reward"] = RewardModule(reward=route, max_missing=1.0)
    course.scorer.min_votes = 1
    with pytest.raises(UserError, match="fewer than 1 votes within"):
        course.begin()
    texts = {}
    for number in range(8):
        for prompt in course.iterations[number].prompts:
            texts.setdefault(prompt.family == chosen, set()).add(prompt.text)
    first = read_pairs(course.folder).values()
    assert len(first) == 3 and {pair.prompt for pair in first} <= texts[True] - texts[False]
    shown = []
    course.follower.album = SimpleNamespace(
        offer=lambda prompts, show: shown.extend(
            (prompt.text, show(place).getpixel((0, 0))) for place, prompt in enumerate(prompts)
        )
    )
    images = torch.tensor([0.0, 1.0, torch.nan, 0.2])[:, None, None, None].expand(4, 3, 8, 8)
    families = ["another", chosen, chosen, chosen]
    course.follower._offer(images, [Prompt(f"{i}", f) for i, f in enumerate(families)])
    assert shown == [("1", (255, 255, 255)), ("3", (51, 51, 51))]


def test_votes_without_their_pictures_are_not_waited_with(tmp_path):
    """They cannot be fitted to, so that pairs are drawn and voted on in their place. Mutation:
    count the lines of the list.
    """
    course = Course(tmp_path)
    for pair in course.pairs[1:]:
        for name in {pair.left, pair.right} - {course.pairs[0].left, course.pairs[0].right}:
            picture_path(course.folder, name).unlink(missing_ok=True)
    assert len(usable_votes(course.folder, read_votes(course.folder))) == 1
    with pytest.raises(UserError, match=r"fewer than 4 votes within reward\.wait_seconds=0\.1"):
        course.begin()
    assert course.told[0].startswith("waiting for votes (1 of 4, until")
    # With the vote, three are needed, and those of an iteration more.
    assert len(open_pairs(course.folder)) == 5
    for pair in open_pairs(course.folder)[:3]:
        cast(course.folder, vote_on(pair, "left"))
    course.begin()
    assert course.scorer.in_force is not None
    assert course.told[-1].startswith("iteration 1: 4 votes, ")


def test_first_pairs_are_new_ones(tmp_path):
    """Those that an earlier start has drawn are drawn again, and count once. Mutation: count what
    was drawn.
    """
    course = Course(tmp_path, "num_iterations=4", said=[])
    for min_votes, expected in ((4, 6), (7, 9)):
        course.scorer.min_votes = min_votes
        with pytest.raises(UserError, match=f"fewer than {min_votes} votes"):
            course.begin()
        assert len(open_pairs(course.folder)) == expected


def test_a_vote_that_is_taken_back_after_the_wait_costs_no_iteration(tmp_path):
    """It is scored by the votes that ended the wait, and says so; the next one waits again.
    Mutation: score by what is left, which is too few.
    """
    course = Course(tmp_path)
    course.begin()
    course.start(0)
    course.end(0)
    fit = course.scorer.in_force
    cast(course.folder, vote_on(course.pairs[0], "undone"))
    course.start(1)
    assert course.scorer.in_force is not None
    assert torch.equal(course.scorer.in_force.slope, fit.slope)
    [told] = [line for line in course.told if "taken back" in line]
    assert told.startswith("iteration 2: votes were taken back, 3 are left")
    assert read_rounds(tmp_path)[2].num_votes == 4 and read_rounds(tmp_path)[2].num_lines == 4
    course.iterations.num_iterations = 3
    course.end(1)
    assert course.follower.stop.has_signal
    assert "3 of 4 votes after 0.1 s: stopping" in course.told


def test_a_model_of_clips_is_refused_also_with_votes(tmp_path, monkeypatch):
    """Before an iteration is drawn. Mutation: look at the pairs that are drawn alone."""
    course = Course(tmp_path)
    clips = torch.zeros(1, 2, 3, 8, 8)
    monkeypatch.setattr(course.policy.model, "decode", lambda x0: clips[: len(x0)])
    with pytest.raises(UserError, match="people vote on pictures, and the model draws clips"):
        course.begin()


def test_a_resumed_run_fits_on_its_own_device(tmp_path, monkeypatch):
    """As the running one did: the reward is moved first, which the policy does only later.
    Mutation: fit where it was loaded.
    """
    course = Course(tmp_path)
    course.begin()
    done = []
    monkeypatch.setattr(course.policy.reward, "to", lambda device: done.append(device.type))
    monkeypatch.setattr(course.scorer, "fit", lambda ballot: done.append(len(ballot.votes)))
    course.policy.num_iterations = 1
    course.follower.on_fit_start(course.trainer, course.policy)
    assert done == ["cpu", 4]
