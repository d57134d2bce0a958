"""Small pipelines of the families whose text encoder sees the picture to be edited."""

from __future__ import annotations

from diffusers import QwenImageEditPlusPipeline
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from families import coders, encoders, words
from families.family import Family
from families.images import QWEN_GUIDANCE, QWEN_IDLE, WIDTH, qwen_scheduler, qwen_transformer

NUM_HALVINGS = 5
"""Of a picture's sides by the autoencoder: the pipeline resizes what it edits to a million pixels,
which make 256 tokens here.
"""
SIGHT_PIXELS = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
"""Least and most pixels that the text encoder looks at: nine tokens at most."""


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """Make a pipeline of Qwen-Image-Edit-Plus's kind, as released with Qwen-Image-Edit-2511."""
    tokenizer = words.qwen_tokenizer()
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=SIGHT_PIXELS),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=words.CHAT,
    )
    return QwenImageEditPlusPipeline(
        transformer=qwen_transformer(zero_cond_t=True),
        scheduler=qwen_scheduler(),
        vae=coders.qwen_image(NUM_HALVINGS, num_blocks=0),
        text_encoder=encoders.qwen2_5_vl(tokenizer, WIDTH),
        tokenizer=tokenizer,
        processor=processor,
    )


EDITS = {
    "qwen_image_edit_plus": Family(
        qwen_image_edit_plus,
        {"height": 128, "width": 192} | QWEN_GUIDANCE,
        picture=(40, 48),
        idle=QWEN_IDLE,
    ),
}
