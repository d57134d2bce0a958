"""A stock pipeline's own call as a velocity field, a grid and a decoder of rows of states."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor

from flowrl.models.derived.arguments import UNGUIDED, Arguments
from flowrl.models.derived.edits import ALONE, SIZE, blank, of_picture, remember_blanks
from flowrl.models.derived.leaving import Refused, failing
from flowrl.models.derived.networks import (
    decoding_in_float32,
    giving_float32,
    take_times_in_float32,
)
from flowrl.models.derived.recording import (
    ENCODERS,
    METHODS,
    PROBE,
    STATE,
    TEXTS,
    Placed,
    Probe,
    bare_call,
    players,
    record,
    replaced,
    scheduled,
    with_state,
)
from flowrl.models.derived.standin import StandIn, Step, Stepped, Witness, exchanged
from flowrl.models.derived.times import Times
from flowrl.models.derived.trees import Layout, unflatten
from flowrl.models.experts import components_of
from flowrl.models.text import quiet

log = logging.getLogger(__name__)

Rows = Mapping[str, Shaped[Tensor, "B ..."]]

Recorded = list[Any] | dict[str, Any]
"""What texts were encoded to, in order; of a prompt with a picture what all methods returned, by
their names.
"""


@dataclass(frozen=True)
class Asked:
    """The arguments of a velocity: states at one sigma, the rows of their texts, which have one
    layout, and the guidance scale.
    """

    x: Float[Tensor, "B ..."]
    sigma: float
    texts: Rows
    layout: Layout
    scale: float

    def row(self, number: int) -> Asked:
        """Return one of the rows alone."""
        return replace(self, x=self.x[[number]], texts=row_of(self.texts, number))


@dataclass(frozen=True)
class Sampling:
    """One sample drawn by a pipeline's own loop: its steps, and its image or video, float32."""

    steps: list[Step]
    images: Tensor

    @property
    def num_frames(self) -> int | None:
        """The frames of a video, which may be one alone; None of an image."""
        return self.images.shape[1] if self.images.ndim == 5 else None


class Stock:
    """A pipeline without its text side, called with what was recorded in place of its texts.

    From now on the stand-in is the pipeline's scheduler. `alone_at` are the guidance scales at
    which its call turned out to take one row alone. Raises Refused where its grid is no rectified
    flow's.
    """

    def __init__(
        self,
        pipeline: Any,
        settings: Mapping[str, Any],
        arguments: Arguments,
        probe: Probe,
        dtype: torch.dtype,
    ) -> None:
        self.pipeline = pipeline
        self.dtype = dtype
        self.settings = settings
        self.arguments = arguments
        self.probe = probe
        self.times = Times(*probe.grid, scale=settings.get("num_train_timesteps", 1000))
        self.alone_at: set[float] = set()
        self.together_at: set[float] = set()
        self.stand_in = exchanged(StandIn, settings)
        pipeline.scheduler = self.stand_in
        self.networks = components_of(pipeline)
        for network in self.networks.values():
            take_times_in_float32(network)
        kind = type(pipeline)
        # Calls by the thousand would repeat a pipeline's warnings as often.
        logging.getLogger(kind.__module__).setLevel(logging.ERROR)
        pipeline.__class__ = type(kind.__name__, (Placed, kind), {})
        pipeline.place = torch.device("cpu")
        remember_blanks(pipeline)
        self._call = bare_call(pipeline)
        self._constants = {name: value[None] for name, value in probe.constants.items()}
        self._texts = {name: value[None] for name, value in probe.texts.items()}

    def to(self, device: torch.device) -> None:
        """Keep what belongs to the call on this device from now on."""
        self.pipeline.place = device
        self._constants = {name: value.to(device) for name, value in self._constants.items()}
        self._texts = {name: value.to(device) for name, value in self._texts.items()}

    def velocity(self, asked: Asked) -> Float[Tensor, "B ..."]:
        """Return noise minus data at the states asked for, float32: what the pipeline hands its
        scheduler at the first step of a call that begins with them.

        Where the call takes one row alone, each gets one of its own: as its layout says, or if the
        first call for several at this scale fails and calls for each do not. Raises Refused
        where the pipeline hands its scheduler nothing, or something of another shape.
        """
        num_rows = len(asked.x)
        scale = asked.scale
        if num_rows == 1:
            return self._velocity(asked)
        if of_picture(asked.layout).get(ALONE) or scale in self.alone_at:
            return self._velocity_by_row(asked)
        try:
            with failing("its call"):
                velocity = self._velocity(asked)
            self.together_at.add(scale)
            return velocity
        except Refused as error:
            # Replays must not go other ways than their rollouts.
            if scale in self.together_at:
                raise
            reason = str(error)
        velocity = self._velocity_by_row(asked)
        self.alone_at.add(scale)
        log.warning(
            "a %s takes one row a call at guidance_scale=%g, so each gets a call of its own, which "
            "takes longer: with %d rows, %s",
            type(self.pipeline).__name__,
            scale,
            num_rows,
            reason,
        )
        return velocity

    def _velocity_by_row(self, asked: Asked) -> Float[Tensor, "B ..."]:
        """Return the velocity of rows each of which goes through a call of its own."""
        return torch.cat([self._velocity(asked.row(i)) for i in range(len(asked.x))])

    def _velocity(self, asked: Asked) -> Float[Tensor, "B ..."]:
        """Return the velocity of rows that go through one call."""
        own_sigma, timestep = self.times.at(asked.sigma)
        self.stand_in.ask([own_sigma], timestep)
        arguments = self._arguments(asked.layout, len(asked.x), asked.scale)
        try:
            with giving_float32(self.networks.values(), self.dtype):
                # A copy, since some pipelines write into their state.
                self._run(asked.x.clone(), unflatten(asked.layout, asked.texts), arguments)
        except Stepped as end:
            output = end.output
            sample_shape = end.sample.shape
        else:
            raise Refused("its call ends without a step of its scheduler")
        require_whole(asked.x.shape, sample_shape, output.shape)
        return -output.float() if self.times.is_mirrored else output.float()

    def decode(self, x0: Float[Tensor, "B ..."]) -> Float[Tensor, "B *F 3 H W"]:
        """Return images, or clips [B, F, 3, H, W], in [0, 1], float32: the call's result with no
        step at all.

        Raises Refused where its axes are others.
        """
        if len(x0) > 1 and self.probe.is_alone:
            return torch.cat([self.decode(x0[[i]]) for i in range(len(x0))])
        self.stand_in.ask([], torch.empty(0))
        arguments = self._arguments(self.probe.text_layout, len(x0), UNGUIDED)
        with decoding_in_float32(self.pipeline.vae):
            output = self._run(x0.clone(), self.probe_texts(len(x0)), arguments)
        images = output[0]
        if not isinstance(images, Tensor):
            raise Refused(f"its call gives a {type(images).__name__}, not images as one tensor")
        if images.ndim not in (4, 5) or images.shape[-3] != 3:
            raise Refused(
                f"its call gives {tuple(images.shape)}, neither pictures (B, 3, H, W) nor clips "
                "(B, F, 3, H, W)"
            )
        # A clip of a single frame is a picture.
        is_picture = images.ndim == 5 and images.shape[1] == 1
        return images.squeeze(1).float() if is_picture else images.float()

    def grid(self, num_steps: int) -> tuple[float, ...]:
        """Return the sigmas of the pipeline's own grid, from 1 to 0; their very timesteps are taken
        from now on.
        """
        device = self.pipeline.place
        x = torch.zeros(1, *self.probe.state_shape, device=device)
        arguments = self._arguments(self.probe.text_layout, 1, UNGUIDED, num_steps)
        with replaced(self.pipeline, self.methods(x, self.probe_texts(1))):
            tape = record(self.pipeline, self.settings, arguments, device)
        return self.times.keep(*tape.grid)

    @torch.no_grad()
    def sample(
        self,
        texts: Rows,
        layout: Layout,
        scale: float,
        num_steps: int,
        seed: int,
        picture: Image.Image | None,
        *,
        last: Tensor | None = None,
    ) -> Sampling:
        """Sample one row by the pipeline's own loop, on its own grid, with nothing replaced but its
        solver, what the dropped encoders gave, and the state of the last step where `last` is one;
        `picture` is that of the row's prompt.
        """
        if (picture is None) != (not of_picture(layout)):
            raise ValueError("a row with a picture is sampled with it, and one without, without")
        witness = exchanged(Witness, self.settings)
        steps = witness.watch(last)
        arguments = self.arguments.of(PROBE, 1, scale, num_steps, picture)
        if "generator" in self.arguments.names:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        recorded = unflatten(layout, texts)
        if of_picture(layout):
            methods = players({name: recorded[name] for name in ENCODERS if recorded[name]})
        else:
            methods = players({TEXTS: recorded})
        with scheduled(self.pipeline, witness), replaced(self.pipeline, methods), quiet():
            output = self.pipeline(**arguments)
        if len(steps) != num_steps:
            raise Refused(f"it steps {len(steps)} times where it was asked for {num_steps} steps")
        require_whole((1, *self.probe.state_shape), steps[0].before.shape, steps[0].output.shape)
        return Sampling(steps, output[0].float())

    def probe_texts(self, rows: int) -> Recorded:
        """Return what texts are encoded to, for so many rows of the prompt of the probe."""
        outputs: Recorded = unflatten(self.probe.text_layout, _expanded(self._texts, rows))
        return outputs

    def methods(self, x: Tensor, texts: Recorded) -> dict[str, Any]:
        """Return the pipeline's methods that give what was recorded, with the state x."""
        if isinstance(texts, dict):
            outputs = {name: texts[name] for name in METHODS}
        else:
            outputs = {TEXTS: texts}
            constants = _expanded(self._constants, len(x))
            for name in METHODS[1:]:
                layouts = self.probe.layouts[name]
                outputs[name] = [unflatten(layout, constants) for layout in layouts]
        outputs[STATE] = [with_state(value, x) for value in outputs[STATE]]
        return players({name: values for name, values in outputs.items() if values})

    def _arguments(
        self, layout: Layout, rows: int, scale: float, num_steps: int | None = None
    ) -> dict[str, Any]:
        """Return the arguments of a call that replays rows of this layout."""
        size = of_picture(layout).get(SIZE)
        picture = None if size is None else blank(tuple(size))
        return self.arguments.of(PROBE, rows, scale, num_steps, picture)

    def _run(self, x: Tensor, texts: Recorded, arguments: Mapping[str, Any]) -> Any:
        with replaced(self.pipeline, self.methods(x, texts)):
            return self._call(self.pipeline, **arguments)


def require_whole(state: Sequence[int], sample: Sequence[int], output: Sequence[int]) -> None:
    """Raise Refused unless the scheduler steps a state of the shape that was prepared."""
    if tuple(output) != tuple(state) or tuple(sample) != tuple(state):
        raise Refused(
            f"its state is {tuple(state)}, but its scheduler steps {tuple(sample)} by "
            f"{tuple(output)}: it is cut or changed before the step"
        )


def row_of(rows: Rows, number: int) -> dict[str, Tensor]:
    """Return one of the rows."""
    return {name: value[number : number + 1] for name, value in rows.items()}


def _expanded(rows: Rows, count: int) -> dict[str, Tensor]:
    """Return one row so many times, without copies."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in rows.items()}
