"""The verdict on an image: its objects, and their colours, against what a GenEval prompt asks for.

Ghosh et al. 2023, arXiv 2310.11513, github.com/djghosh13/geneval: `first_fault` gives its verdict,
right or wrong. `share_fulfilled` grades, as flow_grpo does in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flowrl.rewards.detection import Box, Detection
from flowrl.rewards.geneval_task import Clause, Task

DEAD_ZONE = 0.1
"""Share of two objects' summed sizes by which their centres must differ, as published."""

DIRECTION = 0.5
"""Share of the distance that what is left must have along an axis, as published: the sine of 30
degrees.
"""

Objects = Mapping[str, Sequence[Detection]]
"""The objects that count, by class, the surest first."""


def to_be_coloured(task: Task, objects: Objects) -> dict[int, Sequence[Detection]]:
    """Return the objects whose colours decide, by the number of the clause that asks for them: its
    `count` surest, where there are as many.
    """
    chosen = {}
    for number, clause in enumerate(task.include):
        candidates = objects.get(clause.name, ())
        if clause.colour is not None and len(candidates) >= clause.count:
            chosen[number] = candidates[: clause.count]
    return chosen


def relations(a: Box, b: Box) -> set[str]:
    """Return how the first box lies to the second: none, one or two of `RELATIONS`.

    The offset of their centres, (dx, dy), is moved towards 0 by `DEAD_ZONE` of the sum of their
    widths, and of their heights. A relation holds where what is left is more than `DIRECTION` of
    the length of the whole offset.
    """
    boxes = np.array([a, b]).reshape(2, 2, 2)  # [box, corner, axis]
    centres = boxes.mean(1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - DEAD_ZONE * sizes.sum(0), 0.0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {
        "left of": dx < -DIRECTION,
        "right of": dx > DIRECTION,
        "above": dy < -DIRECTION,
        "below": dy > DIRECTION,
    }
    return {relation for relation, is_true in holds.items() if is_true}


def all_related(
    detections: Sequence[Detection], targets: Sequence[Detection] | None, relation: str
) -> bool:
    """Tell whether each of the objects lies so to each of the targets; None are targets that failed
    their own clause.
    """
    if targets is None:
        return False
    for detection in detections:
        for target in targets:
            if relation not in relations(detection.box, target.box):
                return False
    return True


def first_fault(task: Task, objects: Objects, colours: Mapping[int, Sequence[str]]) -> str | None:
    """Say what is wrong with an image, None where it is correct in the published sense.

    Every clause of `include` must have its `count` of objects or more; the `count` surest must all
    have the colour, and lie so to those that fulfilled the target's clause. Every class of
    `exclude` must have fewer than its `count`. `colours` are those of `to_be_coloured`.
    """
    earlier: list[Sequence[Detection]] = []
    for number, clause in enumerate(task.include):
        chosen = objects.get(clause.name, ())[: clause.count]
        fault = _fault(clause, chosen, colours.get(number, ()), earlier)
        if fault is not None:
            return fault
        earlier.append(chosen)
    for clause in task.exclude:
        count = len(objects.get(clause.name, ()))
        if count >= clause.count:
            return f"{clause.name}: {count} found, fewer than {clause.count} wanted"
    return None


def _fault(
    clause: Clause,
    chosen: Sequence[Detection],
    colours: Sequence[str],
    earlier: Sequence[Sequence[Detection]],
) -> str | None:
    """Say how an image fails a clause, None where it does not."""
    if len(chosen) < clause.count:
        return f"{clause.name}: {len(chosen)} found, {clause.count} wanted"
    if clause.colour is not None and colours.count(clause.colour) < clause.count:
        return f"{clause.name}: {', '.join(colours)}, {clause.colour} wanted"
    if clause.relation is None:
        return None
    if not all_related(chosen, earlier[clause.target], clause.relation):
        return f"{clause.name}: not {clause.relation} what entry {clause.target} asks for"
    return None


def share_fulfilled(task: Task, objects: Objects, colours: Mapping[int, Sequence[str]]) -> float:
    """Compute flow_grpo's training score (github.com/yifan123/reward-server), the mean of a few
    terms; 1 where every count is exact and all else holds.

    Of each clause of `include`, with n its count, the terms are

    - 1 - |m - n| / n, with m the number of objects, which is negative for m > 2 n;
    - where m = n and a colour is asked for, 1 - |k - n| / n, with k the objects of that colour;
    - where m = n and the colours hold, for a relation 1 where it holds and 0 where it does not;
    - where m differs from n, one 0 if a colour or a relation is asked for.

    `exclude` is not looked at, since counts must be exact. The published code adds a further 1 for
    a relation that is false although both classes were found, so that it scores 3/4 where this is
    2/3; nothing else differs.
    """
    terms = []
    fulfilled: list[Sequence[Detection] | None] = []
    for number, clause in enumerate(task.include):
        candidates = objects.get(clause.name, ())
        terms_of_clause = _terms(clause, candidates, colours.get(number, ()), fulfilled)
        terms += terms_of_clause
        is_fulfilled = all(term == 1.0 for term in terms_of_clause)
        fulfilled.append(candidates if is_fulfilled else None)
    return sum(terms) / len(terms)


def _terms(
    clause: Clause,
    candidates: Sequence[Detection],
    colours: Sequence[str],
    fulfilled: Sequence[Sequence[Detection] | None],
) -> list[float]:
    """Compute the terms of one clause, all of them 1 where it is fulfilled."""
    count = _closeness(len(candidates), clause.count)
    if len(candidates) != clause.count:
        asks_for_more = clause.colour is not None or clause.relation is not None
        return [count, 0.0] if asks_for_more else [count]
    terms = [count]
    if clause.colour is not None:
        terms.append(_closeness(colours.count(clause.colour), clause.count))
    if clause.relation is not None and terms[-1] == 1.0:
        is_true = all_related(candidates, fulfilled[clause.target], clause.relation)
        terms.append(float(is_true))
    return terms


def _closeness(number: int, wanted: int) -> float:
    return 1 - abs(number - wanted) / wanted
