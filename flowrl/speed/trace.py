"""Where the time of one iteration goes, operator by operator, and when its device was idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

MICROSECOND = 1e-6
"""A profiler's unit of time, in seconds."""


@dataclass(frozen=True, slots=True)
class Idle:
    """The gaps of a time in which a device had nothing to do: all of them together, the longest, in
    the unit of the time, and their number.
    """

    total: float
    longest: float
    num_gaps: int


@dataclass(frozen=True, slots=True)
class Operator:
    """The calls of one operator: seconds in the operator itself, those that it calls left out, and
    the number of calls.
    """

    name: str
    seconds: float
    num_calls: int


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A profiled stretch of so many `seconds`, broken down.

    `operators` have their time on the device, or on the CPU where no device was profiled, longest
    first. `rest` are the seconds in none of them: of kernels that no operator started, such as
    those of a scorer's thread, or of Python. `idle` is None where no device was profiled.
    """

    seconds: float
    operators: Sequence[Operator]
    rest: float
    idle: Idle | None


def find_idle(busy: Iterable[tuple[float, float]], start: float, end: float) -> Idle:
    """Return the gaps between `start` and `end` that no interval of `busy` covers; intervals may
    overlap, as those of several streams do, and come in any order.
    """
    gaps = []
    reached = start
    for first, last in sorted(busy):
        if min(first, end) > reached:
            gaps.append(min(first, end) - reached)
        reached = max(reached, min(last, end))
    if end > reached:
        gaps.append(end - reached)
    return Idle(sum(gaps), max(gaps, default=0.0), len(gaps))


def break_down(events: Sequence[Any], stretch: str, *, has_device: bool) -> Breakdown:
    """Break the stretch that is annotated so down into operators.

    `events` are those of `torch.profiler.profile.events()`.
    """
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    [whole] = [event for event in on_cpu if event.name == stretch]
    if not has_device:
        return _on_cpu(on_cpu, whole.time_range)
    kernels = [event for event in events if event.device_type != DeviceType.CPU]
    return _on_device(on_cpu, kernels, whole.time_range)


def _on_cpu(on_cpu: Sequence[Any], whole: Any) -> Breakdown:
    """Break the time from the start to the end of `whole` down by what the CPU did."""
    length = (whole.end - whole.start) * MICROSECOND
    annotations = [event for event in on_cpu if event.is_user_annotation]
    rest = sum(event.self_cpu_time_total for event in annotations) * MICROSECOND
    return Breakdown(length, add_up(on_cpu, _seconds_on_cpu), rest, None)


def _on_device(on_cpu: Sequence[Any], kernels: Sequence[Any], whole: Any) -> Breakdown:
    """Break the time from the start to the end of `whole` down by the kernels of its operators."""
    # An annotation is drawn on the device too, over the kernels that began within it.
    busy = [
        (event.time_range.start * MICROSECOND, event.time_range.end * MICROSECOND)
        for event in kernels
        if not event.is_user_annotation
    ]
    operators = add_up(on_cpu, _seconds_on_device)
    of_operators = sum(operator.seconds for operator in operators)
    rest = sum(last - first for first, last in busy) - of_operators
    start = whole.start * MICROSECOND
    end = whole.end * MICROSECOND
    return Breakdown(end - start, operators, rest, find_idle(busy, start, end))


def add_up(events: Sequence[Any], seconds_of: Callable[[Any], float]) -> list[Operator]:
    """Add up the calls of each operator, longest first; an annotation is a name for others, whose
    time is theirs.
    """
    seconds: dict[str, float] = defaultdict(float)
    num_calls: dict[str, int] = defaultdict(int)
    for event in events:
        took = seconds_of(event)
        if took and not event.is_user_annotation:
            seconds[event.name] += took
            num_calls[event.name] += 1
    operators = [Operator(name, took, num_calls[name]) for name, took in seconds.items()]
    return sorted(operators, key=lambda operator: -operator.seconds)


def _seconds_on_cpu(event: Any) -> float:
    return float(event.self_cpu_time_total * MICROSECOND)


def _seconds_on_device(event: Any) -> float:
    return float(sum(kernel.duration for kernel in event.kernels) * MICROSECOND)
