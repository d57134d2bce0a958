"""What a family of pipelines is here: a small random pipeline of the real classes, and what its
stock call takes for a small picture or clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

from flowrl.runs.files import grant_usual_mode

ZERO_SPREAD = 0.2
"""Standard deviation of what a fresh network starts at zero."""

NETWORKS = ("transformer", "unet", "vae")
"""What is strengthened; the text encoders' weights are drawn large."""
GAIN = math.sqrt(3)
"""From the variance of a fresh layer's output, a third of its input's, to the same."""


@dataclass(frozen=True)
class Family:
    """A family's small pipeline, and how it is called.

    `build` draws from torch's global generator. `call` holds what the stock call takes beside
    prompt, number of steps, generator and picture. `picture` is the height and width of the picture
    that a prompt comes with, in pixels. `idle` names attention layers of the last block whose
    output the pipeline drops, so that they have no gradient. `obstacle` says why velocities cannot
    be taken from this pipeline's steps; None where they can.
    """

    build: Callable[[], Any]
    call: Mapping[str, Any]
    picture: tuple[int, int] | None = None
    idle: tuple[str, ...] = ()
    obstacle: str | None = None

    def make(self, seed: int = 0) -> Any:
        """Return the pipeline, in float32; a seed gives the same weights everywhere."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipeline = self.build()
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module):
                    wake(part)
                    if name.startswith(NETWORKS):
                        strengthen(part)
        return pipeline

    def arguments(self, prompt: str, seed: int = 0, num_steps: int = 4) -> dict[str, Any]:
        """Return the arguments of a stock call that draws one small picture or clip."""
        noise = torch.Generator().manual_seed(seed)
        beside = {"prompt": prompt, "num_inference_steps": num_steps, "generator": noise}
        if self.picture:
            beside["image"] = self.draw(seed=0)
        return dict(self.call) | beside

    def draw(self, seed: int) -> Image.Image:
        """Draw a picture of random colours, of the size of those that come with a prompt."""
        assert self.picture is not None, "this family takes no picture"
        height, width = self.picture
        colours = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(colours)

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write the pipeline into a folder, and return the folder."""
        save(self.make(seed), folder, torch.float32)
        return folder


def wake(network: nn.Module) -> None:
    """Draw every parameter that is zero throughout, and end training mode.

    Networks start gates and last layers at zero, which would let neither text nor time nor a
    gradient through.
    """
    network.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=ZERO_SPREAD)


def strengthen(network: nn.Module) -> None:
    """Let every layer keep its input's size, as a trained network's do: fresh ones halve it, and
    text or a picture is lost among a few of them.
    """
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                module.weight.mul_(GAIN)


def save(pipeline: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a pipeline in diffusers layout, its networks in `dtype`."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    grant_usual_mode(folder)
