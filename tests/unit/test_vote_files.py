"""The lists of pairs and votes: what counts, what is torn, and what is taken back."""

import hashlib
import json
import multiprocessing
import os
from dataclasses import asdict

import pytest
from ballots import BLUE, GREEN, GREY, RED, digest, fill, plain, vote_on

from flowrl.errors import UserError
from flowrl.types import Prompt
from flowrl.votes import files
from flowrl.votes.album import Album, remove_old, write_pairs
from flowrl.votes.files import AlreadyVoted, Pair, cast, open_pairs, read_pairs, read_votes
from flowrl.votes.rounds import ROUNDS, last_votes, read_rounds, votes_of_round

PAIRS = [
    Pair(left=digest(f"l{i}"), right=digest(f"r{i}"), prompt=f"é {i}", iteration=i)
    for i in range(4)
]


def choices(folder, num_lines=None):
    """What counts, by the number of the pair."""
    keys = [pair.key for pair in PAIRS]
    return {keys.index(vote.key): vote.choice for vote in read_votes(folder, num_lines).votes}


def test_a_pair_has_at_most_one_vote_until_it_is_taken_back(tmp_path):
    """Mutation: count both, take back the first, or let nothing be taken back twice."""
    cast(tmp_path, vote_on(PAIRS[0], "left"))
    cast(tmp_path, vote_on(PAIRS[1], "equal"))
    with pytest.raises(AlreadyVoted):
        cast(tmp_path, vote_on(PAIRS[0], "right"))
    assert choices(tmp_path) == {0: "left", 1: "equal"}
    cast(tmp_path, vote_on(PAIRS[0], "undone"))
    with pytest.raises(AlreadyVoted):
        cast(tmp_path, vote_on(PAIRS[0], "undone"))
    assert choices(tmp_path) == {1: "equal"}
    cast(tmp_path, vote_on(PAIRS[0], "right"))
    assert choices(tmp_path) == {1: "equal", 0: "right"}
    # What earlier iterations saw stays readable.
    assert [choices(tmp_path, n) for n in (0, 1, 3)] == [{}, {0: "left"}, {1: "equal"}]


def test_a_line_says_all_that_there_is_to_know(tmp_path):
    """Digests of both pictures, prompt, iteration, time and tab, as UTF-8. Mutation: leave one
    out.
    """
    cast(tmp_path, vote_on(PAIRS[2], "left", tab="t"))
    [line] = (tmp_path / "votes.jsonl").read_bytes().splitlines(keepends=True)
    assert line.endswith(b"\n") and "é 2".encode() in line
    assert json.loads(line) == {
        "left": digest("l2"),
        "right": digest("r2"),
        "prompt": "é 2",
        "iteration": 2,
        "choice": "left",
        "time": "2026-12-01T12:00:00+00:00",
        "tab": "t",
    }


def test_a_torn_line_costs_itself_alone(tmp_path):
    """A kill left half a line, which is not there for a reader, and is ended by the next writer.

    Mutation: read what has no end, or write behind it.
    """
    path = tmp_path / "votes.jsonl"
    cast(tmp_path, vote_on(PAIRS[0], "left"))
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        before = read_votes(tmp_path)
        assert (before.num_lines, before.num_damaged) == (1, 0)
        cast(tmp_path, vote_on(PAIRS[1], "right"))
        after = read_votes(tmp_path)
        # Without its end alone, the line was a vote: of a pair that had one, its own.
        is_whole = cut == len(whole) - 1
        assert after.num_lines == 3 and after.num_damaged == (0 if is_whole else 1)
        assert choices(tmp_path) == {0: "left", 1: "right"}
        # What was there stays the beginning of the list.
        assert read_votes(tmp_path, 1).digest == before.digest


@pytest.mark.parametrize(
    "change",
    [
        {"left": "../../secret"},
        {"right": digest("r0")[:-1]},
        {"choice": "both"},
        {"prompt": None},
        {"iteration": "1"},
    ],
)
def test_a_line_of_another_form_is_no_vote(tmp_path, change):
    """A name that leads out of the folder above all. Mutation: take any digest or choice."""
    values = asdict(vote_on(PAIRS[0], "left")) | change
    (tmp_path / "votes.jsonl").write_text(f"{json.dumps(values)}\n[1]\n{{}}\n")
    ballot = read_votes(tmp_path)
    assert ballot.votes == () and (ballot.num_lines, ballot.num_damaged) == (3, 3)


def test_a_prefix_has_a_digest_of_its_bytes(tmp_path):
    """As sha256sum gives it. Mutation: digest of all lines, or of the votes that count."""
    for pair in PAIRS[:3]:
        cast(tmp_path, vote_on(pair, "left"))
    lines = (tmp_path / "votes.jsonl").read_bytes().splitlines(keepends=True)
    for n in range(4):
        expected = hashlib.sha256(b"".join(lines[:n])).hexdigest()
        assert read_votes(tmp_path, n).digest == expected
    with pytest.raises(UserError, match="4 lines were there, 3 are"):
        read_votes(tmp_path, 4)


def vote_often(folder, tab):
    won = 0
    for number in range(40):
        pair = Pair(left=digest(f"{number}"), right=digest("r"), prompt="", iteration=0)
        try:
            cast(folder, vote_on(pair, "left", tab))
            won += 1
        except AlreadyVoted:
            pass
    (folder / f"{tab}.won").write_text(str(won))


def test_two_servers_at_once_give_each_pair_one_vote(tmp_path):
    """Mutation: no lock between reading and writing."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=vote_often, args=(tmp_path, tab)) for tab in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    ballot = read_votes(tmp_path)
    assert ballot.num_lines == len(ballot.votes) == 40 and not ballot.num_damaged
    won = [int((tmp_path / f"{tab}.won").read_text()) for tab in "ab"]
    assert sum(won) == 40


def test_an_album_has_two_different_pictures_of_a_prompt():
    """Of the first prompts, in the order in which they come, over several calls; a call that is
    repeated gives no pair of a picture with itself.

    Mutation: pair a picture with itself, or take a third prompt.
    """
    album = Album(2)
    prompts = [Prompt(text) for text in ("a", "a", "b")]
    first = [plain(RED), plain(RED), plain(GREEN)]
    album.offer(prompts, first.__getitem__)
    assert album.pairs == {}
    later = [Prompt(text) for text in ("c", "b", "a", "a", "c")]
    second = [plain(RED), plain(BLUE), plain(GREY), plain(BLUE), plain(BLUE)]
    album.offer(later, second.__getitem__)
    shown = [
        (text, left.getpixel((0, 0)), right.getpixel((0, 0)))
        for text, left, right in album.pairs.values()
    ]
    assert shown == [("b", GREEN, BLUE), ("a", RED, GREY)]


def test_a_pair_that_is_drawn_again_is_listed_once(tmp_path):
    """As by a resumed run. Mutation: append without looking."""
    drawn = [("a", plain(RED), plain(BLUE)), ("b", plain(RED), plain(GREEN))]
    assert write_pairs(tmp_path, drawn, 3) == 2
    assert write_pairs(tmp_path, drawn, 3) == 0
    pairs = list(read_pairs(tmp_path).values())
    assert [(pair.prompt, pair.iteration) for pair in pairs] == [("a", 3), ("b", 3)]
    for pair in pairs:
        for name in (pair.left, pair.right):
            content = (tmp_path / "pictures" / f"{name}.png").read_bytes()
            assert hashlib.sha256(content).hexdigest() == name


def age(folder):
    """Let all pictures be an hour old."""
    for path in (folder / "pictures").iterdir():
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)


def test_pictures_that_nobody_voted_on_go_oldest_first(tmp_path):
    """Those of votes stay, also of one that was taken back, and those that a kept pair shares.

    Mutation: keep the oldest, or remove what a vote needs.
    """
    colours = [(10 * i, 0, 0) for i in range(12)]
    said = [(plain(colours[2 * i]), plain(colours[2 * i + 1]), None) for i in range(5)]
    said.append((plain(colours[0]), plain(colours[11]), None))
    pairs = fill(tmp_path, said)
    cast(tmp_path, vote_on(pairs[1], "left"))
    cast(tmp_path, vote_on(pairs[2], "left"))
    cast(tmp_path, vote_on(pairs[2], "undone"))
    assert open_pairs(tmp_path) == [pairs[i] for i in (0, 2, 3, 4, 5)]
    age(tmp_path)
    remove_old(tmp_path, 2)
    assert [files.has_pictures(tmp_path, pair) for pair in pairs] == [0, 1, 1, 0, 1, 1]
    assert files.picture_path(tmp_path, pairs[0].left).is_file()
    assert open_pairs(tmp_path) == [pairs[i] for i in (2, 4, 5)]


def test_a_pair_on_a_screen_keeps_its_pictures(tmp_path):
    """Until it has been out of sight for a while. Mutation: remove it, or keep it for ever."""
    pairs = fill(tmp_path, [(plain((i, 0, 0)), plain((i, 9, 9)), None) for i in range(4)])
    remove_old(tmp_path, 1)  # new, and perhaps on a screen already
    assert open_pairs(tmp_path) == pairs
    age(tmp_path)
    files.mark_as_seen(tmp_path, pairs[1])
    remove_old(tmp_path, 1)
    assert open_pairs(tmp_path) == [pairs[1], pairs[3]]
    age(tmp_path)
    remove_old(tmp_path, 1)
    assert open_pairs(tmp_path) == [pairs[3]]
    files.mark_as_seen(tmp_path, pairs[0])  # gone: nothing to keep


def test_two_pictures_are_one_pair_whichever_is_on_the_left(tmp_path):
    """Listed once, voted on once, and the vote says who stood where. Mutation: a key by order."""
    [pair] = fill(tmp_path, [(plain(RED), plain(BLUE), None)])
    assert write_pairs(tmp_path, [("prompt 0", plain(BLUE), plain(RED))], 1) == 0
    turned = Pair(left=pair.right, right=pair.left, prompt="prompt 0", iteration=1)
    assert (
        turned.key == pair.key != Pair(left=pair.left, right=pair.left, prompt="", iteration=0).key
    )
    cast(tmp_path, vote_on(turned, "left"))
    with pytest.raises(AlreadyVoted):
        cast(tmp_path, vote_on(pair, "right"))
    [vote] = read_votes(tmp_path).votes
    assert (vote.left, vote.choice) == (pair.right, "left") and open_pairs(tmp_path) == []


def test_an_iterations_votes_without_their_pictures_are_told(tmp_path):
    """Since it would be scored by fewer than before. Mutation: compare the lines alone."""
    run, folder = tmp_path / "run", tmp_path / "votes"
    run.mkdir()
    pairs = fill(folder, [(plain(RED), plain(BLUE), "left"), (plain(RED), plain(GREY), "left")])
    files.picture_path(folder, pairs[1].right).unlink()
    votes_of_round(run, folder, 1)
    assert read_rounds(run)[1].num_votes == 1
    assert votes_of_round(run, folder, 1)[1]
    files.picture_path(folder, pairs[0].right).unlink()
    with pytest.raises(UserError, match=r"pictures: 0 of the votes that iteration 1 .* 1 had"):
        votes_of_round(run, folder, 1)


def test_an_iteration_has_the_votes_that_it_had_before(tmp_path):
    """Whatever came since; a new one has all. Mutation: read all lines, or record nothing."""
    run, folder = tmp_path / "run", tmp_path / "votes"
    run.mkdir()
    cast(folder, vote_on(PAIRS[0], "left"))
    ballot, is_recorded = votes_of_round(run, folder, 1)
    assert len(ballot.votes) == 1 and not is_recorded
    cast(folder, vote_on(PAIRS[1], "left"))
    assert len(votes_of_round(run, folder, 2)[0].votes) == 2
    cast(folder, vote_on(PAIRS[0], "undone"))
    for iteration, expected in ((1, 1), (2, 2)):
        ballot, is_recorded = votes_of_round(run, folder, iteration)
        assert len(ballot.votes) == expected and is_recorded
    assert [read_rounds(run)[i].num_lines for i in (1, 2)] == [1, 2]
    # A line that a kill cut off is no round.
    text = (run / ROUNDS).read_text()
    (run / ROUNDS).write_text(text + text.splitlines()[0][:20])
    assert sorted(read_rounds(run)) == [1, 2]
    assert len(votes_of_round(run, folder, 3)[0].votes) == 1
    assert len(last_votes(run, folder, 2).votes) == 2 and last_votes(run, folder, 0) is None


def test_votes_that_were_changed_are_told(tmp_path):
    """Mutation: compare nothing."""
    run, folder = tmp_path / "run", tmp_path / "votes"
    run.mkdir()
    cast(folder, vote_on(PAIRS[0], "left"))
    votes_of_round(run, folder, 1)
    path = folder / "votes.jsonl"
    path.write_text(path.read_text().replace('"left", "time"', '"right", "time"'))
    with pytest.raises(UserError, match=r"first 1 lines are not those that iteration 1"):
        votes_of_round(run, folder, 1)
    path.unlink()
    with pytest.raises(UserError, match=r"1 lines were there, 0 are"):
        last_votes(run, folder, 1)
