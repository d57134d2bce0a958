"""What a pipeline makes of a prompt and its picture is recorded once a prompt, with everything that
its methods gave, and replayed without the picture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from flowrl.models.derived.arguments import UNGUIDED, Arguments
from flowrl.models.derived.leaving import Refused
from flowrl.models.derived.recording import (
    METHODS,
    PROBE,
    STATE,
    NeedsPicture,
    Placed,
    Probe,
    Tape,
    axes_of,
    check_unguided,
    count_texts,
    flatten_texts,
    probe,
    record,
    require_methods,
    state_of,
    without_state,
)
from flowrl.models.derived.trees import Axes, Layout, flatten
from flowrl.models.protocol import Use

SIZE = "size"
"""The name of the picture's width and height in the layout of a row."""

ALONE = "is_alone"
"""The name of what says there that the pipeline's call takes one row alone."""

BLANK = "blank"
"""The mark of a picture that stands for others of its size."""

NUM_KEPT = 16
"""Results of an image processor that are kept, of some megabytes each."""


def drawn_picture(seed: int = 0) -> Image.Image:
    """Draw a small picture of random colours, to find out with what a pipeline's methods return."""
    colours = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Image.fromarray(colours)


@lru_cache(NUM_KEPT)
def blank(size: tuple[int, int]) -> Image.Image:
    """Return a black picture of a width and height: in a replay nothing but the size counts."""
    picture = Image.new("RGB", size)
    picture.info[BLANK] = True
    return picture


def record_edit(
    pipeline: Any,
    settings: Mapping[str, Any],
    arguments: Arguments,
    device: torch.device,
    prompt: str,
    picture: Image.Image,
    *,
    rows: int = 1,
    scale: float | None = None,
    num_texts: int | None = None,
) -> Tape:
    """Call a pipeline with a prompt and its picture, as `record` does; the autoencoder is on
    `device`, too, and what it draws is the same in every call.
    """
    scale = arguments.recorded_scale if scale is None else scale
    values = arguments.of(prompt, rows, scale, picture=picture)
    if "generator" in arguments.names:
        values["generator"] = torch.Generator().manual_seed(0)
    with encoding_on(pipeline, device):
        return record(pipeline, settings, values, device, num_texts)


@contextmanager
def encoding_on(pipeline: Any, device: torch.device) -> Iterator[None]:
    """Run with the autoencoder on a device, which the pipeline takes for its own."""
    kind = type(pipeline)
    if isinstance(pipeline, Placed):
        yield
        return
    before = next(pipeline.vae.parameters()).device
    pipeline.vae.to(device)
    pipeline.__class__ = type(kind.__name__, (Placed, kind), {})
    pipeline.place = device
    try:
        yield
    finally:
        pipeline.__class__ = kind
        pipeline.vae.to(before)


def probe_either(
    pipeline: Any,
    settings: Mapping[str, Any],
    arguments: Arguments,
    device: torch.device,
    use: Use,
) -> tuple[Probe, Use]:
    """Find out what a pipeline's methods return, and how it uses pictures after all: always where
    its call fails without one, though its signatures say "sometimes".

    Raises Refused for a pipeline that this cannot be found out of.
    """
    if use == "always":
        return probe_edit(pipeline, settings, arguments, device), use
    try:
        return probe(pipeline, settings, arguments, device), use
    except NeedsPicture as error:
        reason = str(error)
    try:
        return probe_edit(pipeline, settings, arguments, device), "always"
    except Refused as error:
        raise Refused(f"{reason}; and with one {error}") from error


def probe_edit(
    pipeline: Any, settings: Mapping[str, Any], arguments: Arguments, device: torch.device
) -> Probe:
    """Find out what a pipeline's methods return for a prompt with a picture.

    Where two rows of it cannot go through one call, each row goes through one of its own, and all
    that was returned is kept whole. Raises Refused for a pipeline that this cannot be found out of.
    """
    require_methods(pipeline)
    recorded = partial(record_edit, pipeline, settings, arguments, device, PROBE, drawn_picture())
    one = recorded()
    num_texts = count_texts(one)
    try:
        axes = axes_of(one, recorded(rows=2))
        is_alone = False
    except Refused:
        axes = axes_of(one, one)
        is_alone = True
    if arguments.has_guidance:
        bare = recorded(scale=UNGUIDED, num_texts=num_texts)
        check_unguided(flatten_texts(bare, axes)[0], flatten_texts(one, axes)[0])
    state = state_of(one, axes, is_alone=is_alone)
    tensors, layout = flatten_edit(one, axes, drawn_picture(), is_alone=is_alone)
    return Probe(
        axes=axes,
        num_texts=num_texts,
        texts=tensors,
        text_layout=layout,
        state_shape=tuple(state.shape[1:]),
        constants={},
        layouts={},
        grid=one.grid,
        is_alone=is_alone,
    )


def flatten_edit(
    tape: Tape, axes: Axes, picture: Image.Image, *, is_alone: bool
) -> tuple[dict[str, Tensor], Layout]:
    """Return the tensors of the row of a prompt with a picture by name, and their layout, which
    holds the picture's size.
    """
    tensors: dict[str, Tensor] = {}
    parts: list[list[Any]] = []
    for name in METHODS:
        outputs = tape.outputs[name]
        if name == STATE:
            outputs = [without_state(output) for output in outputs]
        layouts = [
            [number, flatten(output, f"{name}.{number}", axes, tensors, is_entry=is_alone)]
            for number, output in enumerate(outputs)
        ]
        parts.append([name, {"list": layouts}])
    parts.append([SIZE, {"value": list(picture.size)}])
    parts.append([ALONE, {"value": is_alone}])
    return tensors, {"dict": parts}


def of_picture(layout: Layout) -> dict[str, Any]:
    """Return what a row's layout says of its picture, `SIZE` and `ALONE`; nothing where it has
    none.
    """
    parts = layout.get("dict", ())
    return {name: part["value"] for name, part in parts if name in (SIZE, ALONE)}


class Remembering:
    """An image processor that prepares each size of blank pictures once: a replay needs nothing of
    what becomes of them but shapes, and preparing a picture takes as long as a small network.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._results: OrderedDict[Any, Any] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def resize(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Resize a picture."""
        return self._once("resize", image, args, kwargs)

    def preprocess(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """Turn a picture into a tensor."""
        return self._once("preprocess", image, args, kwargs)

    def _once(self, name: str, image: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        method = getattr(self._processor, name)
        if not isinstance(image, Image.Image) or BLANK not in image.info:
            return method(image, *args, **kwargs)
        key = (name, image.size, repr(args), repr(sorted(kwargs.items())))
        if key not in self._results:
            self._results[key] = method(image, *args, **kwargs)
            if len(self._results) > NUM_KEPT:
                self._results.popitem(last=False)
        return self._results[key]


def remember_blanks(pipeline: Any) -> None:
    """Let a pipeline's processors of pictures, which are no components, prepare blank ones once."""
    for name, value in list(vars(pipeline).items()):
        if isinstance(value, VaeImageProcessor):
            setattr(pipeline, name, Remembering(value))
