"""The reward of votes: what it scores by, when it says nothing, and what it shows to people."""

import pytest
import torch
from ballots import BLUE, GREEN, GREY, RED, fill, plain, vote_on
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from runs import composed
from scorers import save_clip
from torch import nn

from flowrl.callbacks.votes import _agreement
from flowrl.errors import UserError
from flowrl.images.image_statistics import panel
from flowrl.launch.votes import with_folder, with_votes_of
from flowrl.rewards.images import to_tensor
from flowrl.rewards.looks import CLIPFeatures, Statistics
from flowrl.training.reward import RewardModule
from flowrl.types import Prompt
from flowrl.votes.files import cast, picture_path, read_votes

PROMPTS = [Prompt("prompt 0"), Prompt("prompt 1"), Prompt("prompt 2")]
SAID = [
    (plain(RED), plain(GREEN), "left"),
    (plain(BLUE), plain(RED), "right"),
    (plain(GREY), plain(RED), "right"),
    (plain(BLUE), plain(GREEN), "equal"),
]


def votes(place, **changes):
    """The reward as its YAML has it, over a folder."""
    cfg = composed("reward=votes").reward
    OmegaConf.set_struct(cfg, False)
    cfg.update({"folder": str(place), "min_votes": 4} | changes)
    return instantiate(cfg)


def test_people_who_prefer_red_make_red_the_reward(tmp_path):
    """The order of scores, their zero, and the part. Mutation: flip the sign, or take the left one
    for the preferred one.
    """
    fill(tmp_path, SAID)
    output = votes(tmp_path)([plain(RED), plain(BLUE), plain(GREEN)], PROMPTS)
    red, blue, green = output.values.tolist()
    assert red > 0.5 and blue < 0 and green < 0
    assert output.is_valid.all() and output.applies is None
    expected = [1 / (1 + 2.718281828459045**-value) for value in (red, blue, green)]
    assert output.parts["win_rate"].tolist() == pytest.approx(expected, rel=1e-5)
    shown = [left for left, _, _ in SAID] + [right for _, right, _ in SAID]
    scores = votes(tmp_path)(shown, [Prompt("any")] * 8).values
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)


def test_it_says_nothing_until_it_is_told_by_what_to_score(tmp_path):
    """As in training before its first fit. Mutation: a score of 0 for everything."""
    fill(tmp_path, SAID)
    reward = votes(tmp_path)
    reward.follow(None)
    output = RewardModule(reward=reward, max_missing=0.0).score([plain(RED)], PROMPTS[:1])
    assert output.is_valid.all() and not output.applies.any() and output.values.isnan().all()
    reward.follow(reward.fit(read_votes(tmp_path)))
    assert reward([plain(RED)], PROMPTS[:1]).values > 0.5


def test_too_few_votes_are_told(tmp_path):
    """Outside of training. Mutation: fit to whatever there is."""
    fill(tmp_path, SAID)
    with pytest.raises(UserError, match=r"4 votes, fewer than reward.min_votes=5"):
        votes(tmp_path, min_votes=5)([plain(RED)], PROMPTS[:1])
    with pytest.raises(UserError, match=r"3 votes, fewer than reward.min_votes=4"):
        votes(tmp_path, lines=3)([plain(RED)], PROMPTS[:1])
    with pytest.raises(UserError, match=r"reward.folder=null"):
        votes(tmp_path, folder=None)([plain(RED)], PROMPTS[:1])


def test_a_vote_without_its_pictures_does_not_count(tmp_path, caplog):
    """And is told. Mutation: fail, or count it."""
    pairs = fill(tmp_path, [*SAID, (plain((1, 2, 3)), plain((3, 2, 1)), "left")])
    reward = votes(tmp_path)
    whole = reward.fit(read_votes(tmp_path, 4))
    picture_path(tmp_path, pairs[4].left).unlink()
    assert torch.equal(reward.fit(read_votes(tmp_path)).slope, whole.slope)
    assert "the pictures of 1 votes are gone" in caplog.text
    with pytest.raises(UserError, match=r"4 votes, fewer than reward.min_votes=5"):
        votes(tmp_path, min_votes=5)([plain(RED)], PROMPTS[:1])
    picture_path(tmp_path, pairs[3].left).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"is damaged"):
        votes(tmp_path).fit(read_votes(tmp_path, 4))


def test_the_same_votes_give_the_same_bits(tmp_path):
    """Whatever was fitted before. Mutation: start from the last fit."""
    fill(tmp_path, SAID)
    ballot = read_votes(tmp_path)
    reward = votes(tmp_path, min_votes=2)
    reward.fit(read_votes(tmp_path, 2))
    again, once = reward.fit(ballot), votes(tmp_path, min_votes=2).fit(ballot)
    assert torch.equal(again.slope, once.slope) and again.offset == once.offset


class Crowded(nn.Module):
    """Features that depend on how many pictures there are at once, as a network's last bits do."""

    def forward(self, images, prompts):
        assert len(images) == len(prompts)
        means = to_tensor(images).mean((2, 3))
        return means * (1 + 1e-6 * len(images))


def test_features_do_not_depend_on_what_else_is_new(tmp_path):
    """A running process meets votes a few at a time, a resumed one all at once: the same bits.
    Mutation: take the features of all new pictures at once.
    """
    fill(tmp_path, SAID)
    running, resumed = votes(tmp_path, min_votes=2), votes(tmp_path, min_votes=2)
    running.features = resumed.features = Crowded()
    for num_lines in (2, 3):
        running.fit(read_votes(tmp_path, num_lines))
    kept, anew = running.fit(read_votes(tmp_path)), resumed.fit(read_votes(tmp_path))
    assert torch.equal(kept.slope, anew.slope) and kept.offset == anew.offset


def test_votes_for_neither_are_not_called_an_agreement(tmp_path):
    """Of which there is none to agree with. Mutation: print the NaN of their share."""
    fill(tmp_path, [(left, right, "equal") for left, right, _ in SAID])
    assert _agreement(votes(tmp_path).fit(read_votes(tmp_path))) == "all of them for neither"
    fill(tmp_path, [(plain((1, 2, 3)), plain((200, 2, 3)), "right")])
    assert _agreement(votes(tmp_path).fit(read_votes(tmp_path))) == "100% agreed with"
    assert _agreement(None) == "too few to fit"


def test_statistics_by_hand():
    """Half red, half black: means (.5, 0, 0), deviations (.5, 0, 0). Mutation: another order, or
    the sample's deviation.
    """
    picture = plain((0, 0, 0), side=4)
    picture.paste((255, 0, 0), (0, 0, 2, 4))
    features = Statistics()([picture, plain(GREY, side=6)], PROMPTS[:2])
    assert features.shape == (2, 9)
    assert features[0, :6].tolist() == pytest.approx([0.5, 0, 0, 0.5, 0, 0])
    assert features[1, :6].tolist() == pytest.approx([90 / 255] * 3 + [0] * 3, abs=1e-6)
    looks = panel(to_tensor([picture]))
    names = ("edge_density", "colour_entropy", "high_frequency")
    assert features[0, 6:].tolist() == pytest.approx([float(looks[name]) for name in names])


def test_clips_features_are_the_images_and_its_cosine_with_the_prompt(tmp_path):
    """Mutation: the text's features, or another prompt's cosine."""
    folder = save_clip(tmp_path)
    features = CLIPFeatures(pretrained=folder, processor=folder, dtype="float32", batch_size=2)
    pictures = [plain(RED, 32), Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 50)]
    prompts = [Prompt("a red circle"), Prompt("two blue squares")]
    with torch.no_grad():
        rows = features(pictures, prompts)
        images = features.image_features(pictures)
        texts = features.text_features([prompt.text for prompt in prompts])
    torch.testing.assert_close(rows[:, :-1], images)
    for row in range(2):
        assert float(rows[row, -1]) == pytest.approx(float(images[row] @ texts[row]), abs=1e-6)


def test_a_run_has_its_own_votes_unless_it_names_others(tmp_path):
    """Also inside a mixture; an evaluation has as many as there are when it begins. Mutation: look
    at the outermost reward alone, or overwrite what was named.
    """
    run = tmp_path / "run"
    cfg = composed("reward=shapes")
    OmegaConf.set_struct(cfg, False)
    assert with_folder(cfg, run) is cfg
    votes_node = composed("reward=votes").reward
    cfg.reward = {"rewards": {"people": votes_node, "named": {**votes_node, "folder": "mine"}}}
    rewards = with_folder(cfg, run).reward.rewards
    assert rewards.people.folder == str(run / "votes") and rewards.named.folder == "mine"
    assert cfg.reward.rewards.people.folder is None
    fill(run / "votes", SAID)
    assert with_votes_of(cfg, run).reward.rewards.people.lines == 4
    [pair] = fill(run / "votes", [(plain((1, 1, 1)), plain((2, 2, 2)), None)])
    cast(run / "votes", vote_on(pair, "left"))
    assert with_votes_of(cfg, run).reward.rewards.people.lines == 5
