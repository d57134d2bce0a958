"""The exact reward of the shapes world: the verifier's answer to each atom of the caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flowrl.errors import UserError
from flowrl.rewards.images import to_tensor
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import Images
from flowrl.shapes.grammar import parse
from flowrl.shapes.verify import verify
from flowrl.types import Prompt, RewardOutput


class ShapesReward:
    """`score`: `soft` (mean over atoms), `geometric` (geometric mean), `strict` (1 where every atom
    holds) or `clean`.

    `clean` is the share of found objects that match a shape template, 0 where nothing was found; it
    ignores the prompt.

    Parts: soft, strict, off_palette (share of pixels that no blend of background and one colour
    explains) and clean_objects (share of found objects that match a shape template; missing where
    nothing was found).
    """

    def __init__(self, *, score: Literal["soft", "geometric", "strict", "clean"]) -> None:
        if score not in ("soft", "geometric", "strict", "clean"):
            raise UserError(f"reward.score={score!r} must be soft, geometric, strict or clean")
        self.score = score

    part_names = ("soft", "strict", "off_palette", "clean_objects")

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        captions = []
        reasons = {}
        for i, prompt in enumerate(prompts):
            try:
                captions.append(parse(prompt.text))
            except ValueError as error:
                captions.append(parse("a circle"))
                reasons[i] = str(error)
        pixels = images if isinstance(images, Tensor) else to_tensor(images)
        verdicts = verify(pixels.float().permute(0, 2, 3, 1).cpu().numpy(), captions)
        cleanness = [[found.is_clean for found in verdict.objects] for verdict in verdicts]
        parts = {
            "soft": [verdict.soft for verdict in verdicts],
            "strict": [verdict.strict for verdict in verdicts],
            "off_palette": [verdict.off_palette for verdict in verdicts],
            "clean_objects": [
                sum(clean) / len(clean) if clean else float("nan") for clean in cleanness
            ],
        }
        tensors = {name: torch.tensor(part) for name, part in parts.items()}
        if self.score == "clean":
            values = tensors["clean_objects"].nan_to_num(0.0)
        else:
            values = torch.tensor([getattr(verdict, self.score) for verdict in verdicts])
        is_valid = torch.tensor([i not in reasons for i in range(len(prompts))])
        info = [
            {REASON: reasons[i]} if i in reasons else dict(verdict.atoms)
            for i, verdict in enumerate(verdicts)
        ]
        return RewardOutput(values, is_valid, tensors, info)
