"""Small pipelines of the families whose text encoder sees the picture to be edited."""

from __future__ import annotations

from diffusers import QwenImageEditPlusPipeline

from families import coders, encoders, words
from families.family import Family
from families.images import QWEN_GUIDANCE, QWEN_IDLE, WIDTH, qwen_scheduler, qwen_transformer

NUM_HALVINGS = 5
"""Of a picture's sides by the autoencoder: the pipeline resizes what it edits to a million pixels,
which make 256 tokens here.
"""


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """Make a pipeline of Qwen-Image-Edit-Plus's kind, as released with Qwen-Image-Edit-2511."""
    processor = words.qwen_processor()
    return QwenImageEditPlusPipeline(
        transformer=qwen_transformer(zero_cond_t=True),
        scheduler=qwen_scheduler(),
        vae=coders.qwen_image(NUM_HALVINGS, num_blocks=0),
        text_encoder=encoders.qwen2_5_vl(processor.tokenizer, WIDTH),
        tokenizer=processor.tokenizer,
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
