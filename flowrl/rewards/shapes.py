"""The exact reward of the shapes world is the verifier's answer to each atom of the caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flowrl.errors import UserError
from flowrl.rewards.images import to_tensor
from flowrl.rewards.outputs import REASON
from flowrl.rewards.protocol import Images
from flowrl.shapes.grammar import Caption, parse
from flowrl.shapes.verify import Verdict, verify
from flowrl.types import Prompt, RewardOutput
from flowrl.values.check import checked

PLACEHOLDER = parse("a circle")
"""The caption that is verified where a prompt is none; its score is not used."""


class ShapesReward:
    """The verifier's answers to the atoms of a caption, put together as `score` says.

    - `soft` is the mean over atoms.
    - `geometric` is their geometric mean.
    - `strict` is 1 where every atom holds, else 0.
    - `clean` is the share of found objects that match a shape template, 0 where nothing was found;
      it ignores the prompt.

    A sample whose prompt is no caption is missing. Its parts are:

    - soft and strict, as above;
    - off_palette, the share of pixels that no blend of background and one colour explains;
    - clean_objects, the share of found objects that match a shape template, which is missing where
      nothing was found.
    """

    @checked("reward")
    def __init__(self, *, score: Literal["soft", "geometric", "strict", "clean"]) -> None:
        self.score = score

    part_names = ("soft", "strict", "off_palette", "clean_objects")
    only_computes = True

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        captions, reasons = _read_captions(prompts)
        # Tensors are verified as they are, not rounded to 8 bits.
        pixels = images if isinstance(images, Tensor) else to_tensor(images)
        channels_last = pixels.float().permute(0, 2, 3, 1)  # [B, H, W, 3]
        verdicts = verify(channels_last.cpu().numpy(), captions)
        parts = {
            "soft": _column(verdicts, "soft"),
            "strict": _column(verdicts, "strict"),
            "off_palette": _column(verdicts, "off_palette"),
            "clean_objects": _column(verdicts, "clean_share"),
        }
        if self.score == "clean":
            # An image without objects is the worst, not a missing one.
            values = parts["clean_objects"].nan_to_num(0.0)
        else:
            values = _column(verdicts, self.score)
        is_readable = [row not in reasons for row in range(len(prompts))]
        is_valid = torch.tensor(is_readable)
        info: list[Mapping[str, object]] = [dict(verdict.atoms) for verdict in verdicts]
        for row, reason in reasons.items():
            info[row] = {REASON: reason}
        return RewardOutput(
            values=values,
            is_valid=is_valid,
            parts=parts,
            info=info,
        )


def _read_captions(prompts: Sequence[Prompt]) -> tuple[list[Caption], dict[int, str]]:
    """Read the captions, a placeholder where a prompt is none, and say by its number why it is
    none.

    The placeholder keeps one caption a row, as the verifier takes images and captions in pairs.
    """
    captions = []
    reasons = {}
    for row, prompt in enumerate(prompts):
        try:
            captions.append(parse(prompt.text))
        except UserError as error:
            captions.append(PLACEHOLDER)
            reasons[row] = str(error)
    return captions, reasons


def _column(verdicts: Sequence[Verdict], name: str) -> Float[Tensor, "B"]:
    values = [getattr(verdict, name) for verdict in verdicts]
    return torch.tensor(values)
