"""Tokenizers of every kind that pipelines ask for, made on the spot.

Those of CLIP and T5 know single characters. The others, whose pipelines put a prompt into a
template and cut the template off again by a fixed number of tokens, know its words too, so that
what remains is about as long as with the released vocabulary and the prompt is never cut away.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from tokenizers import pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    T5Tokenizer,
)

LETTERS = string.ascii_lowercase + string.digits + ",.-'"
NUM_CLIP_TOKENS = 77
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor "
    "%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
SIGHT_MARKS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SIGHT_PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
"""Least and most pixels that a text encoder looks at: nine tokens at most."""
LLAMA_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
TEXT = """
a actions add additional alignment alter an and angles any are aspects assistant atmosphere
avoid background based be behaviors below blue by camera changes circle cluttered color colors
commentary concrete consistency content create degree describe description descriptions designed
detailed detailing details enhance enhanced ensure evaluate evaluations events examples existing
explain features focus following for from generate generated generation given green here how
image images in include including input instruction is it key left level lighting main
maintaining meets modify movement movements new objects of on only or original output
overcomplicating physical place please prompt prompts provides quantity red refine relationships
requirements right scene scenes shape shapes should simple size sizes slightly spatial specifics
square style suitable superior system temporal text text-image textual texture textures that the
theme then to transform transitions triangle two used user user's video visual vivid where while
with without yellow you your
"""
WORDS = TEXT.split()
"""The words of the pipelines' templates and of small prompts."""


def merges_of(words: Sequence[str], space: str) -> Any:
    """Return the merges that make one token of each word behind a space, letter by letter: pairs of
    what is merged.

    Every merge begins with the space's mark, so that none of them applies within a word, and a word
    that is not listed keeps the longest beginning that is.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        start = space
        for letter in word:
            merges[start, letter] = None
            start += letter
    return list(merges)


def numbered(tokens: Sequence[str]) -> dict[str, int]:
    """Return each token's number, in order of first appearance."""
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def clip_tokenizer() -> CLIPTokenizer:
    """Make a tokenizer of CLIP's kind that knows single characters."""
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *LETTERS,
        *(f"{letter}</w>" for letter in LETTERS),
    ]
    return CLIPTokenizer(vocab=numbered(tokens), merges=[], model_max_length=NUM_CLIP_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Make a tokenizer of T5's kind that knows single characters."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in LETTERS),
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def byte_tokenizer() -> ByT5Tokenizer:
    """Make a tokenizer of ByT5's kind, which needs no vocabulary."""
    return ByT5Tokenizer(extra_ids=0)


def chat_tokenizer(
    words: Sequence[str] = (), marks: Sequence[str] = CHAT_MARKS, **options: Any
) -> Qwen2Tokenizer:
    """Make a tokenizer of Qwen's kind that knows single bytes, and of words those listed.

    `marks` are special tokens of their own.
    """
    merges = merges_of(words, "Ġ")
    tokens = [
        "<|endoftext|>",
        *marks,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(start + letter for start, letter in merges),
    ]
    tokenizer = Qwen2Tokenizer(vocab=numbered(tokens), merges=merges, chat_template=CHAT, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    return tokenizer


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer of Qwen's kind that knows the templates' words and the marks of pictures."""
    return chat_tokenizer(WORDS, (*CHAT_MARKS, *SIGHT_MARKS))


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of GLM's kind, which puts two marks before every text, the empty one too."""
    marks = ("[gMASK]", "<sop>")
    qwen = chat_tokenizer(WORDS, marks)
    core = qwen.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} {marks[1]} $A",
        special_tokens=[(mark, core.token_to_id(mark)) for mark in marks],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=qwen.pad_token, padding_side="left"
    )


def qwen_processor() -> Qwen2VLProcessor:
    """Make what reads texts and pictures for Qwen's models, around `qwen_tokenizer`."""
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=SIGHT_PIXELS),
        tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


def piece_tokens(special: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return the vocabulary of a tokenizer that falls back to bytes and marks spaces by `▁`."""
    tokens = [
        *special,
        *(f"<0x{value:02X}>" for value in range(256)),
        "▁",
        *string.ascii_letters,
        *string.punctuation,
        *string.digits,
        *(start + letter for start, letter in merges),
    ]
    return numbered(tokens)


def gemma_tokenizer(max_length: int = 256) -> GemmaTokenizer:
    """Make a tokenizer of Gemma's kind that knows the templates' words."""
    merges = merges_of(WORDS, "▁")
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    return GemmaTokenizer(
        vocab=piece_tokens(special, merges), merges=merges, model_max_length=max_length
    )


def llama_tokenizer() -> LlamaTokenizer:
    """Make a tokenizer of Llama's kind that knows the templates' words and the marks of a chat."""
    merges = merges_of(WORDS, "▁")
    special = ("<unk>", "<s>", "</s>", *LLAMA_MARKS)
    tokenizer = LlamaTokenizer(
        vocab=piece_tokens(special, merges), merges=merges, pad_token="<|pad|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(LLAMA_MARKS)})
    return tokenizer
