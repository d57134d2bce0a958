"""Text rendering as a reward: how much of the wanted text an OCR reads in the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flowrl.errors import UserError
from flowrl.rewards.images import to_pictures
from flowrl.rewards.loading import require
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Share, Side

TARGET = "target"
"""The key of a prompt's metadata with the text to be drawn; where absent or null, text in double
quotes is meant.
"""

_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


class OCR:
    """1 - min(d, n) / n, with d the edit distance between the text read and the n characters
    wanted.

    Both are compared in lower case without white space, and several quoted pieces are joined. With
    `allows_more_text`, as in flow_grpo, d is 0 wherever the wanted text occurs in what was read;
    without it, every further letter counts, so writing the word twice, a known way to cheat, does
    not pay. Text that the OCR is less sure of than `min_confidence` does not count as read. The
    image is enlarged until its shorter side has `side` pixels. A prompt that wants no text is one
    that the reward does not apply to. Part: exact (1 where d is 0). Needs the extra `ocr`.
    """

    def __init__(self, *, allows_more_text: bool, min_confidence: Share, side: Side) -> None:
        if not 0 <= min_confidence <= 1:
            raise UserError(f"reward.min_confidence={min_confidence} must be in [0, 1]")
        if side < 32:
            raise UserError(f"reward.side={side} must be at least 32")
        require("onnxruntime", "ocr")
        self.allows_more_text = allows_more_text
        self.engine = require("rapidocr", "ocr").RapidOCR(
            params={
                "Global.text_score": min_confidence,
                "Global.use_cls": False,  # text upside down is not what was asked for
                "Global.log_level": "critical",
                "Det.limit_side_len": side,
                "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
            }
        )

    part_names = ("exact",)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        wanted = [plain(target_of(prompt)) for prompt in prompts]
        found = [
            "" if not text else self._read(image)
            for image, text in zip(to_pictures(images), wanted, strict=True)
        ]
        distances = [
            self._distance(plain(read), text) for read, text in zip(found, wanted, strict=True)
        ]
        values = [
            1 - min(distance, len(text)) / len(text) if text else 0.0
            for distance, text in zip(distances, wanted, strict=True)
        ]
        applies = torch.tensor([bool(text) for text in wanted])
        exact = torch.tensor(distances).eq(0).float().masked_fill(~applies, torch.nan)
        return RewardOutput(
            torch.tensor(values),
            torch.ones(len(prompts), dtype=torch.bool),
            {"exact": exact},
            [{"read": read} for read in found],
            applies=applies[:, None],
        )

    def _distance(self, read: str, wanted: str) -> int:
        return 0 if self.allows_more_text and wanted in read else edit_distance(read, wanted)

    def _read(self, image: Any) -> str:
        pixels = np.ascontiguousarray(
            np.asarray(image)[..., ::-1]
        )  # the engine takes arrays as BGR
        return " ".join(self.engine(pixels).txts or ())


def target_of(prompt: Prompt) -> str:
    """The text that a prompt wants drawn; empty where there is none."""
    if prompt.metadata.get(TARGET) is not None:
        return str(prompt.metadata[TARGET])
    return " ".join(straight or curly for straight, curly in _QUOTED.findall(prompt.text))


def plain(text: str) -> str:
    """Lower case, without white space."""
    return "".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: the least number of characters inserted, deleted or replaced."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal = row[0]
        row[0] = i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
