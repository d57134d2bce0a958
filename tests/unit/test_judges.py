import json
import math

import pytest
import torch
from PIL import Image
from servers import answering, client, reply

from flowrl.rewards.geneval2 import GenEval2, variants
from flowrl.rewards.hpsv3 import HPSv3
from flowrl.rewards.judge import Judge
from flowrl.rewards.unified_reward import UnifiedReward
from flowrl.types import Prompt

IMAGES = torch.zeros(3, 3, 4, 4)
PICTURES = [Image.new("RGB", (4, 4))] * 5


def judge(url, top_logprobs=20):
    return Judge(
        url=url, model="vlm", max_tokens=1, top_logprobs=top_logprobs, client=client(retries=0)
    )


def chat(text="", tokens=None):
    tops = [
        {"token": token, "logprob": math.log(p), "bytes": None}
        for token, p in (tokens or {}).items()
    ]
    logprobs = (
        {"content": [{"token": text, "logprob": 0.0, "top_logprobs": tops}]}
        if tokens is not None
        else None
    )
    return {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
        ]
    }


def openai(answer, seen=None):
    """A small OpenAI-compatible server: `answer(path, text)` gives the reply to a question."""

    def behave(handler, body):
        data = json.loads(body)
        picture, words = data["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
        if seen is not None:
            seen.append(data)
        reply(handler, answer(handler.path, words["text"]))

    return answering(behave)


def questions(*pairs, skills=()):
    return {"vqa_list": [list(pair) for pair in pairs], "skills": list(skills)}


COWS = questions(
    ("How many cows are in the image?", "two"),
    ("Are the cows white?", "Yes"),
    skills=("count", "attribute"),
)
TOKENS = {
    "How many cows are in the image? Answer in one word.": {
        "two": 0.3,
        " Two": 0.1,
        "2": 0.2,
        "Three": 0.2,
        "tw": 0.1,
    },
    "Are the cows white? Answer in one word.": {"Yes": 0.05, " yes": 0.05, "No": 0.8},
}


@pytest.mark.parametrize(
    ("mean", "expected"), [("geometric", math.sqrt(0.6 * 0.1)), ("arithmetic", 0.35)]
)
def test_soft_tifa(mean, expected):
    """P(two) = 0.3 + 0.1 + 0.2, P(yes) = 0.05 + 0.05. Mutation: the other mean, one variant only,
    or prefixes too.
    """
    prompts = [Prompt("two white cows", "", COWS)] * 3
    seen = []
    with openai(lambda path, text: chat("x", TOKENS[text]), seen) as url:
        output = GenEval2(mean=mean, judge=judge(url))(IMAGES, prompts)
    assert output.is_valid.all()
    assert output.values.tolist() == pytest.approx([expected] * 3, rel=1e-6)
    assert output.parts["geometric"][0] == pytest.approx(math.sqrt(0.06))
    assert output.parts["skill_count"][0] == pytest.approx(0.6)
    assert output.parts["skill_attribute"][0] == pytest.approx(0.1)
    assert len(seen) == 6
    asked = {
        key: seen[0][key]
        for key in ("model", "max_tokens", "temperature", "logprobs", "top_logprobs")
    }
    assert asked == {
        "model": "vlm",
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_number_words_and_their_variants():
    """Up to ten also as digits; yes in either case, numbers not in capitals of their own making.

    Mutation: no digit, no leading space, or digits for every answer.
    """
    count = "How many cats are in the image?"
    assert variants(count, "seven") == {"seven", "Seven", "7", " seven", " Seven", " 7"}
    assert variants(count, "eleven") == {"eleven", "Eleven", " eleven", " Eleven"}
    assert variants("Is the cat red?", "Yes") == {"Yes", "yes", " Yes", " yes"}


def test_an_unlikely_answer_is_zero_and_a_missing_one_is_missing():
    """No variant among the tokens: 0. No questions, a failed question, no log-probabilities:
    missing.

    Mutation: score 0 for a prompt without questions, as published code does, or leave out failed
    questions.
    """
    prompts = [
        Prompt("none of them", "", questions(("Is it red?", "Yes"))),
        Prompt("no questions"),
        Prompt("half", "", questions(("Is it red?", "Yes"), ("Is it lost?", "Yes"))),
    ]

    def answer(path, text):
        return {"choices": []} if "lost" in text else chat("No", {"No": 1.0})

    with openai(answer) as url:
        output = GenEval2(mean="geometric", judge=judge(url))(IMAGES, prompts)
    assert output.is_valid.tolist() == [True, False, False] and output.values[0] == 0
    assert "no questions" in output.info[1]["missing"] and "vqa_list" in output.info[1]["missing"]
    assert "IndexError" in output.info[2]["missing"]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": {"content": "x"}, "logprobs": {"content": []}}]},
        {
            "choices": [
                {
                    "message": {"content": "x"},
                    "logprobs": {"content": [{"top_logprobs": [{"token": "x"}]}]},
                }
            ]
        },
        {"data": [{"data": ["x"]}]},
        {"data": [{"data": []}]},
        "text",
    ],
)
def test_what_no_judge_says_is_missing(answer):
    """Mutation: let a KeyError take the whole call along."""
    with openai(lambda path, text: answer) as url:
        prompts = [Prompt("a", "", COWS)] * 3
        for reward in (
            GenEval2(mean="geometric", judge=judge(url)),
            UnifiedReward(judge=judge(url, 0)),
            HPSv3(scale=15.0, judge=judge(url)),
        ):
            output = reward(IMAGES, prompts)
            assert not output.is_valid.any() and output.values.tolist() == [0] * 3
            assert all(entry["missing"] for entry in output.info)


def test_unified_reward_reads_the_final_score():
    """Of five; without one from 1 to 5, missing, not 0. Mutation: scale to 4, or take the first
    number or digit.
    """
    replies = {
        "good": "1. Alignment: 2\n2. Quality: fine\nFinal Score: 4.5",
        "bold": "Final Score: **3**",
        "{odd}": "I cannot say.",
        "ten": "Final Score: 10",
        "none": "Final Score: 0.5",
    }
    seen = []
    with openai(lambda path, text: chat(replies[text.rsplit("[", 1)[1][:-1]]), seen) as url:
        output = UnifiedReward(judge=judge(url, 0))(PICTURES, [Prompt(text) for text in replies])
    assert output.is_valid.tolist() == [True, True, False, False, False]
    assert output.values.tolist() == pytest.approx([0.9, 0.6, 0, 0, 0])
    assert "Score: 10" in output.info[3]["missing"]
    assert "I cannot say" in output.info[2]["missing"]
    assert "logprobs" not in seen[0]


def test_a_score_that_was_cut_off_is_none():
    """Of "Final Score: 4.5" the length may let "4" through. Mutation: take it for 4."""
    answer = chat("Final Score: 4")
    answer["choices"][0]["finish_reason"] = "length"
    with openai(lambda path, text: answer) as url:
        output = UnifiedReward(judge=judge(url, 0))(IMAGES, [Prompt("a")] * 3)
    assert not output.is_valid.any()


def test_hpsv3_takes_the_mean_of_the_head():
    """The first of its two outputs over 15; where there is a row for each token, of the last.

    Mutation: take the spread, or the first token.
    """
    heads = {"flat": [7.5, 0.2], "rows": [[9.0, 9.0], [3.0, 0.1]], "nan": [math.nan, 0.0]}
    paths = []

    def answer(path, text):
        paths.append(path)
        return {"object": "list", "data": [{"index": 0, "object": "pooling", "data": heads[text]}]}

    with openai(answer) as url:
        output = HPSv3(scale=15.0, judge=judge(url))(IMAGES, [Prompt(text) for text in heads])
    assert set(paths) == {"/pooling"}
    assert output.is_valid.tolist() == [True, True, False]
    assert output.values.tolist() == pytest.approx([0.5, 0.2, 0])


def test_settings_are_checked():
    """Mutation: drop a check, and a run fails at its first reward."""
    with pytest.raises(ValueError, match="top_logprobs=0"):
        GenEval2(mean="geometric", judge=judge("http://h", 0))
    with pytest.raises(ValueError, match="scale=0"):
        HPSv3(scale=0.0, judge=judge("http://h"))
