import base64
import io
import json
import math

import pytest
from omegaconf import OmegaConf
from PIL import Image
from runs import composed
from servers import answering, client, reply

from flowrl.errors import UserError
from flowrl.launch.scores import check_prompts, check_served
from flowrl.rewards.edit_judge import EditJudge
from flowrl.rewards.judge import Judge, Question
from flowrl.training.reward import RewardModule
from flowrl.types import PictureFile, Prompt

SOURCE, RESULT = (10, 20, 30), (200, 100, 0)


def opened(part):
    """The picture of a part of a message."""
    content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return Image.open(io.BytesIO(content))


def colour(part):
    """The colour of a message's picture, at its upper left."""
    return opened(part).getpixel((0, 0))


@pytest.fixture
def ask(tmp_path):
    """Score one result for each instruction; `replies` are to both pictures and to the result."""
    Image.new("RGB", (8, 6), SOURCE).save(tmp_path / "source.png")
    source = PictureFile(str(tmp_path / "source.png"), "source")

    def run(replies, prompts=()):
        """`replies` is by instruction, with `prompts` for more that have no picture."""
        seen = []

        def behave(handler, body):
            *pictures, words = json.loads(body)["messages"][0]["content"]
            colours = [colour(picture) for picture in pictures]
            seen.append(colours)
            # The quality question names no instruction: it is told by its one picture.
            if len(colours) == 1:
                text = "It looks fine.\nScores: 9, 4"
            else:
                text = replies[words["text"].partition("[")[2].partition("]")[0]]
            message = {"role": "assistant", "content": text}
            # A text that ends in 1 is one that the length cut off.
            ending = "length" if text.endswith("1") else "stop"
            choice = {"index": 0, "message": message, "finish_reason": ending}
            reply(handler, {"choices": [choice]})

        all_prompts = [*(Prompt(text, image=source) for text in replies), *prompts]
        with answering(behave) as url:
            judge = Judge(
                url=url, model="vlm", max_tokens=256, top_logprobs=0, client=client(retries=0)
            )
            module = RewardModule(reward=EditJudge(judge=judge), max_missing=1.0)
            images = [Image.new("RGB", (4, 4), RESULT)] * len(all_prompts)
            return module.score(images, all_prompts), seen

    return run


def test_scores_by_hand(ask):
    """sqrt(min(8, 5)/10 * min(9, 4)/10), and the four parts as they were said.

    Mutation: the larger of two, their product, or the numbers of the sentence before.
    """
    words = "Answer with Scores: 1, 1 at the end? It was followed.\n"
    output, seen = ask({"make it red": words + "Scores: 8, 5"})
    assert output.values.tolist() == pytest.approx([math.sqrt(0.5 * 0.4)])
    got = {name: values.tolist() for name, values in output.parts.items()}
    expected = {"followed": [0.8], "kept": [0.5], "natural": [0.9], "clean": [0.4]}
    assert got == {name: pytest.approx(value) for name, value in expected.items()}
    assert sorted(seen, key=len) == [[RESULT], [SOURCE, RESULT]]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("Scores: [10, 0.5]", (1.0, 0.05)),
        ("**Scores:** 7, 3", (0.7, 0.3)),
        ("Scores: **7**, **3**", (0.7, 0.3)),
        ("Scores: 7/10, 3/10", (0.7, 0.3)),
        ("Scores: followed 7, kept: 3.", (0.7, 0.3)),
        ("**Scores**: **[7, 3]**", (0.7, 0.3)),
        ("scores: **Followed**: 7 , **Kept**: 3 \n", (0.7, 0.3)),
        ("The sign says Scores: 10, 10.\n**Scores**: 2, 3\nSo it is.", (0.2, 0.3)),
        ("Scores: 10, 10\nScores: -1, 3", None),
        ("Scores: kept 3, followed 7", None),
        ("Scores: 8,5, 7,5", None),
        ("Scores: 7, 3/5", None),
        ("Scores: 8, 5, 9", None),
        ("Scores: followed, kept", None),
        ("Scores: 11, 3", None),
        ("Scores: -1, 3", None),
        ("followed 7, kept 3", None),
        ("", None),
    ],
)
def test_forms_of_an_answer(ask, text, pair):
    """Without two numbers from 0 to 10 a sample is missing, and its reply is the reason.

    Mutation: score it 0, or take any two numbers.
    """
    output, _ = ask({"turn {it} blue": text, "other": "Scores: 10, 10"})
    assert output.is_valid.tolist() == [pair is not None, True]
    if pair is None:
        assert "no 'Scores:'" in output.info[0]["missing"]
        assert output.values[0] == 0
    else:
        assert (output.parts["followed"][0], output.parts["kept"][0]) == pytest.approx(pair)


def test_it_has_nothing_to_say_about_prompts_without_a_picture(ask):
    """They are neither missing nor zero, and nobody is asked about them.

    Mutation: count them as missing, or ask about the image alone.
    """
    output, seen = ask({"make it red": "Scores: 10, 10"}, [Prompt("a red circle")])
    assert output.is_valid.tolist() == [True, True]
    assert output.has_value.tolist() == [True, False]
    assert len(seen) == 2


def test_a_number_that_was_cut_off_is_none(ask):
    """Of "9, 10" the length let "9, 1" through. Mutation: take it for .1."""
    output, _ = ask({"cut": "Scores: 9, 1", "whole": "Scores: 9, 1 \nThat was 1"})
    assert output.is_valid.tolist() == [False, True]


def test_a_large_source_is_shown_no_larger_than_its_edit(tmp_path):
    """In its own proportions, and once for two questions. Mutation: send it as it is."""
    Image.new("RGB", (400, 300), SOURCE).save(tmp_path / "large.png")
    source = PictureFile(str(tmp_path / "large.png"), "large")
    sizes = []

    def behave(handler, body):
        *pictures, _ = json.loads(body)["messages"][0]["content"]
        sizes.append([opened(picture).size for picture in pictures])
        reply(handler, {"choices": [{"message": {"content": "x"}}]})

    with answering(behave) as url:
        judge = Judge(url=url, model="vlm", max_tokens=9, top_logprobs=0, client=client(retries=0))
        images = [Image.new("RGB", (40, 40), RESULT)] * 2
        judge.ask(images, [Question(1, "?", source=source), Question(1, "!")])
    assert sorted(sizes, key=len) == [[(40, 40)], [(40, 30), (40, 40)]]


def test_it_is_not_served():
    """A server would be sent no source. Mutation: leave out `reads_pictures`."""
    with pytest.raises(UserError, match="reward=edit_judge cannot be served"):
        check_served(composed("reward=edit_judge").reward)


def test_nor_is_what_asks_it():
    """Mutation: look at the outermost reward alone."""
    inner = composed("reward=edit_judge").reward
    routed = {"_target_": "flowrl.rewards.routed.Routed", "reward": inner, "key": "family"}
    with pytest.raises(UserError, match="reward=edit_judge cannot be served"):
        check_served(OmegaConf.create(routed))


def test_prompts_without_pictures_are_refused_before_anything_loads():
    """Mutation: leave it out of the rewards that have needs."""
    cfg = composed("reward=edit_judge")
    with pytest.raises(UserError, match="pictures to be edited"):
        check_prompts(cfg, [Prompt("a red circle")])
    check_prompts(cfg, [Prompt("make it red", image=PictureFile("x.png", "x"))])
