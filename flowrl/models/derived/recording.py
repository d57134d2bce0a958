"""A pipeline's call is left where what was asked for is at hand; what its methods returned on the
way is recorded, and replayed in calls for other states and rows.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from flowrl.models.derived.arguments import PICTURE, UNGUIDED, Arguments
from flowrl.models.derived.leaving import Ended, Refused, failing
from flowrl.models.derived.standin import Euler, exchanged
from flowrl.models.derived.trees import Axes, Layout, find_axes, flatten
from flowrl.models.experts import components_of
from flowrl.models.text import quiet

TEXTS = "encode_prompt"
STATE = "prepare_latents"
ENCODERS = (TEXTS, "encode_image")
"""The methods that ask what embeds prompts, which is dropped when all of them are embedded."""
METHODS = (TEXTS, STATE, "encode_image", "prepare_image_latents")
"""The methods of a pipeline whose results are recorded. The first gives what belongs to a prompt,
the others what belongs to the call, or to a prompt's picture where it has one.
"""

PROBE = "a photo of a red cube"
"""A prompt to find out with what a pipeline's methods return."""

Method = Callable[..., Any]


class Tape:
    """A record of what a pipeline's methods returned in one call, in order, and of its grid."""

    def __init__(self, scheduler: Euler) -> None:
        self.outputs: dict[str, list[Any]] = defaultdict(list)
        self.scheduler = scheduler

    @property
    def grid(self) -> tuple[list[float], Tensor]:
        """The sigmas without the last one, which is 0, and the timesteps."""
        timesteps: Tensor = self.scheduler.timesteps
        sigmas: Tensor = self.scheduler.sigmas
        return sigmas[: len(timesteps)].tolist(), timesteps


class Placed:
    """Stands before a pipeline's class, and tells its device: stock pipelines look for it at every
    call, module by module, which takes as long as a small network.
    """

    place: torch.device

    @property
    def _execution_device(self) -> torch.device:
        return self.place


class NeedsPicture(Refused):
    """The reason why a pipeline cannot be called without a picture."""


@dataclass(frozen=True)
class Probe:
    """A description of what a pipeline's methods return, by one row and two equal rows of a prompt.

    `axes` are the batch axes by path, `num_texts` is how often texts are encoded in a call.
    `texts` are the tensors of the prompt's row, `constants` those that belong to the call, the
    state left out, one row each; the layouts put them together. `state_shape` is the state's
    without its batch axis, `grid` the pipeline's own, as sigmas and timesteps.

    Where the prompt has a picture, all tensors are in its row (see `edits`), and `is_alone` is true
    for a pipeline whose call takes one row alone, whose tensors have no batch axes then.
    """

    axes: Axes
    num_texts: int
    texts: dict[str, Tensor]
    text_layout: Layout
    state_shape: tuple[int, ...]
    constants: dict[str, Tensor]
    layouts: dict[str, list[Layout]]
    grid: tuple[list[float], Tensor]
    is_alone: bool = False


def bare_call(pipeline: Any) -> Callable[..., Any]:
    """Return the pipeline's call without the decorator that switches gradients off."""
    call: Callable[..., Any] = inspect.unwrap(type(pipeline).__call__)
    return call


@contextmanager
def replaced(pipeline: Any, methods: Mapping[str, Method]) -> Iterator[None]:
    """Run with some of the pipeline's methods replaced; replacements may stand inside others."""
    outer = {name: vars(pipeline)[name] for name in methods if name in vars(pipeline)}
    for name, method in methods.items():
        setattr(pipeline, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(pipeline, name)
        for name, method in outer.items():
            setattr(pipeline, name, method)


@contextmanager
def scheduled(pipeline: Any, scheduler: Any) -> Iterator[None]:
    """Run with another scheduler."""
    before = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        yield
    finally:
        pipeline.scheduler = before


@torch.no_grad()
def record(
    pipeline: Any,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    device: torch.device,
    num_texts: int | None = None,
) -> Tape:
    """Call a pipeline up to its network, or until so many texts are encoded, and return what its
    methods gave.

    Text encoders are on `device`, the networks may be elsewhere. Raises Refused where the call
    never reaches one.
    """
    tape = Tape(exchanged(Euler, settings))

    def recorder(name: str) -> Method:
        method = getattr(pipeline, name)
        takes_device = "device" in inspect.signature(method).parameters

        def recording(*args: Any, **kwargs: Any) -> Any:
            if name == TEXTS and takes_device:
                bound = inspect.signature(method).bind(*args, **kwargs)
                bound.arguments["device"] = device
                output = method(*bound.args, **bound.kwargs)
            else:
                output = method(*args, **kwargs)
            tape.outputs[name].append(output)
            if len(tape.outputs[TEXTS]) == num_texts:
                raise Ended
            return output

        return recording

    methods = {name: recorder(name) for name in METHODS if hasattr(pipeline, name)}
    networks = components_of(pipeline).values()
    hooks = [network.register_forward_pre_hook(_end) for network in networks]
    try:
        with (
            scheduled(pipeline, tape.scheduler),
            replaced(pipeline, methods),
            quiet(),
            failing("its call"),
        ):
            bare_call(pipeline)(pipeline, **arguments)
    except Ended:
        return tape
    finally:
        for hook in hooks:
            hook.remove()
    raise Refused("its call ends without its transformer")


def _end(*_: Any) -> NoReturn:
    raise Ended


def require_methods(pipeline: Any) -> None:
    """Raise Refused for a pipeline without the methods that are recorded."""
    for name in (TEXTS, STATE):
        if not hasattr(pipeline, name):
            raise Refused(f"it has no {name}")


def count_texts(tape: Tape) -> int:
    """Count how often a call encoded texts. Raises Refused where it did not."""
    num_texts = len(tape.outputs[TEXTS])
    if num_texts == 0:
        raise Refused(f"it does not call its {TEXTS}")
    return num_texts


def probe(
    pipeline: Any, settings: Mapping[str, Any], arguments: Arguments, device: torch.device
) -> Probe:
    """Find out what a pipeline's methods return, with its text encoders.

    Raises Refused for a pipeline that this cannot be found out of.
    """
    require_methods(pipeline)
    scale = arguments.recorded_scale
    with telling_of_pictures(arguments):
        one, two = (
            record(pipeline, settings, arguments.of(PROBE, rows, scale), device) for rows in (1, 2)
        )
    axes = axes_of(one, two)
    state = state_of(one, axes, is_alone=False)
    num_texts = count_texts(one)
    texts, text_layout = flatten_texts(one, axes)
    if arguments.has_guidance:
        bare = record(pipeline, settings, arguments.of(PROBE, 1, UNGUIDED), device, num_texts)
        check_unguided(flatten_texts(bare, axes)[0], texts)
    constants, layouts = _constants_of(one, axes)
    return Probe(
        axes=axes,
        num_texts=num_texts,
        texts=texts,
        text_layout=text_layout,
        state_shape=tuple(state.shape[1:]),
        constants=constants,
        layouts=layouts,
        grid=one.grid,
    )


@contextmanager
def telling_of_pictures(arguments: Arguments) -> Iterator[None]:
    """Raise NeedsPicture where a call fails that could take a picture and has none."""
    try:
        yield
    except Refused as error:
        if PICTURE in arguments.names:
            raise NeedsPicture(f"it does not do without a picture: {error}") from error
        raise


def axes_of(one: Tape, two: Tape) -> Axes:
    """Return the batch axes of all that one row and two equal rows of a prompt gave."""
    axes: Axes = {}
    for name in one.outputs.keys() | two.outputs.keys():
        if len(one.outputs[name]) != len(two.outputs[name]):
            raise Refused(f"it calls {name} once a row")
        for number, pair in enumerate(zip(one.outputs[name], two.outputs[name], strict=True)):
            axes |= find_axes(*pair, f"{name}.{number}")
    return axes


def _constants_of(tape: Tape, axes: Axes) -> tuple[dict[str, Tensor], dict[str, list[Layout]]]:
    """Return the tensors that belong to the call, and the layouts of what its methods gave."""
    constants: dict[str, Tensor] = {}
    layouts: dict[str, list[Layout]] = {}
    for name in METHODS[1:]:
        outputs = tape.outputs[name]
        if name == STATE:
            outputs = [without_state(output) for output in outputs]
        layouts[name] = [
            flatten(output, f"{name}.{number}", axes, constants)
            for number, output in enumerate(outputs)
        ]
    return constants, layouts


def state_of(tape: Tape, axes: Axes, *, is_alone: bool) -> Tensor:
    """Return the state that the pipeline prepared; one that is alone is one row. Raises Refused for
    a state that is no rectified flow's or has no rows.
    """
    outputs = tape.outputs[STATE]
    if len(outputs) != 1:
        raise Refused(f"it calls {STATE} {len(outputs)} times in a call, not once")
    is_several = isinstance(outputs[0], (tuple, list))
    state = outputs[0][0] if is_several else outputs[0]
    if not isinstance(state, Tensor) or not state.is_floating_point():
        raise Refused(f"its state, of {STATE}, is no tensor of real numbers")
    first_axis = axes.get(f"{STATE}.0.0" if is_several else f"{STATE}.0")
    is_of_rows = len(state) == 1 if is_alone else first_axis == 0
    if not is_of_rows:
        raise Refused(f"the first axis of its state, {tuple(state.shape)}, is not the rows'")
    return state


def without_state(output: Any) -> Any:
    """Return what `prepare_latents` gave beside the state."""
    if isinstance(output, (tuple, list)):
        return type(output)((None, *output[1:]))
    return None


def with_state(output: Any, x: Tensor) -> Any:
    """Return what `prepare_latents` would give, with this state."""
    if output is None:
        return x
    return type(output)((x, *output[1:]))


def flatten_texts(tape: Tape, axes: Axes) -> tuple[dict[str, Tensor], Layout]:
    """Return the tensors of a prompt's row by name, and their layout."""
    tensors: dict[str, Tensor] = {}
    layouts = [
        [number, flatten(output, f"{TEXTS}.{number}", axes, tensors)]
        for number, output in enumerate(tape.outputs[TEXTS])
    ]
    return tensors, {"list": layouts}


def check_unguided(bare: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> None:
    """Raise Refused unless texts are encoded alike with and without guidance, so that one recording
    serves both.
    """
    for name, value in bare.items():
        other = texts.get(name)
        if (
            other is None
            or other.shape != value.shape
            or not torch.allclose(value.float(), other.float(), rtol=1e-3, atol=1e-3)
        ):
            raise Refused(f"it encodes texts otherwise without guidance ({name})")


_END = object()
"""What stands for the end of a method's recorded outputs."""


def players(outputs: Mapping[str, Sequence[Any]]) -> dict[str, Method]:
    """Return methods that give what was recorded, in order, whatever they are asked."""

    def player(name: str) -> Method:
        entries = iter(outputs[name])

        def playing(*_: Any, **__: Any) -> Any:
            # A method may have returned None, so that an object of its own stands for the end.
            entry = next(entries, _END)
            if entry is _END:
                raise Refused(f"it calls {name} more often than where it was recorded")
            return entry

        return playing

    return {name: player(name) for name in outputs}
