"""Text rendering is a reward here: how much of the wanted text an OCR reads in the image."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from flowrl.rewards.images import to_pictures
from flowrl.rewards.loading import require
from flowrl.rewards.protocol import Images
from flowrl.types import Prompt, RewardOutput
from flowrl.values.bounds import Share, Side
from flowrl.values.check import checked

TARGET = "target"
"""The key of a prompt's metadata with the text to be drawn; where absent or null, text in double
quotes is meant.
"""

_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


class OCR:
    """1 - min(d, n) / n, with d the edit distance between the text read and the n characters
    wanted.

    Both are compared in lower case without white space, and several quoted pieces are joined. A
    prompt that wants no text is one that the reward does not apply to.

    - With `allows_more_text`, as in flow_grpo, d is 0 wherever the wanted text occurs in what was
      read; without it, every further letter counts, so writing the word twice, a known way to
      cheat, does not pay.
    - Text that the OCR is less sure of than `min_confidence` does not count as read.
    - The image is enlarged until its shorter side has `side` pixels.

    Part: exact (1 where d is 0). Needs the extra `ocr`.
    """

    @checked("reward")
    def __init__(self, *, allows_more_text: bool, min_confidence: Share, side: Side) -> None:
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
        applies = torch.tensor([bool(text) for text in wanted])
        values = []
        exact = []
        info = []
        for picture, text in zip(to_pictures(images), wanted, strict=True):
            if text:
                read = self._read(picture)
                distance = self._distance(plain(read), text)
                values.append(1 - min(distance, len(text)) / len(text))
                exact.append(float(distance == 0))
            else:
                read = ""
                values.append(0.0)
                exact.append(torch.nan)
            info.append({"read": read})
        return RewardOutput(
            values=torch.tensor(values),
            is_valid=torch.ones(len(prompts), dtype=torch.bool),
            parts={"exact": torch.tensor(exact)},
            info=info,
            applies=applies[:, None],  # one column, as of a single reward term
        )

    def _distance(self, read: str, wanted: str) -> int:
        if self.allows_more_text and wanted in read:
            return 0
        return edit_distance(read, wanted)

    def _read(self, picture: Image.Image) -> str:
        """Return the texts that the engine sees in a picture, in its order."""
        # The engine takes arrays as BGR, and no views that run backwards.
        reversed_channels = np.asarray(picture)[..., ::-1]
        result = self.engine(np.ascontiguousarray(reversed_channels))
        return " ".join(result.txts or ())


def target_of(prompt: Prompt) -> str:
    """Return the text that a prompt wants drawn; empty where there is none."""
    target = prompt.metadata.get(TARGET)
    if target is not None:
        return str(target)
    # One of the two groups matched: straight quotes or curly ones.
    quoted = [straight or curly for straight, curly in _QUOTED.findall(prompt.text)]
    return " ".join(quoted)


def plain(text: str) -> str:
    """Return a text in lower case, without white space."""
    return "".join(text.lower().split())


def edit_distance(a: str, b: str) -> int:
    """Compute Levenshtein's distance: the least number of letters inserted, deleted or replaced."""
    # row[j] is the distance from the letters of `a` so far to the first j letters of `b`.
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal = row[0]
        row[0] = i
        for j, right in enumerate(b, 1):
            above = row[j]
            row[j] = min(above + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal = above
    return row[-1]
