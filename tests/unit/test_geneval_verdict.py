"""GenEval's scores of objects that are given by hand, by the published rules."""

import pytest
from geneval_cases import (
    BESIDE,
    BOTH,
    BY_RED,
    CAR,
    CARS,
    CUPS,
    DOG,
    LEFT,
    MIDDLE,
    PETS,
    RIGHT,
    entry,
    prompt,
    square,
)

from flowrl.rewards.detection import Detection
from flowrl.rewards.geneval_task import read_task
from flowrl.rewards.geneval_verdict import (
    first_fault,
    relations,
    share_fulfilled,
    to_be_coloured,
)


def objects(**boxes):
    """Detections of each class, all of one score; `stop_sign` is a stop sign."""
    found = {}
    for word, places in boxes.items():
        name = word.replace("_", " ")
        found[name] = [Detection(name, 0.5, place) for place in places]
    return found


@pytest.mark.parametrize(
    ("task", "found", "colours", "strict", "graded"),
    [
        (DOG, objects(dog=[LEFT]), {}, True, 1),
        (DOG, objects(cat=[LEFT]), {}, False, 0),
        (DOG, objects(dog=[LEFT, RIGHT]), {}, True, 0),  # one or more; 1 - 1/1
        (PETS, objects(dog=[LEFT], cat=[RIGHT]), {}, True, 1),
        (PETS, objects(dog=[LEFT]), {}, False, 1 / 2),
        (CUPS, objects(cup=[LEFT, MIDDLE, RIGHT]), {}, True, 1),
        (CUPS, objects(cup=[LEFT, RIGHT]), {}, False, 2 / 3),
        (CUPS, objects(cup=[LEFT] * 4), {}, False, 2 / 3),  # four are excluded
        (CUPS, objects(cup=[LEFT] * 7), {}, False, -1 / 3),
        (CAR, objects(car=[LEFT]), {0: ["red"]}, True, 1),
        (CAR, objects(car=[LEFT]), {0: ["blue"]}, False, 1 / 2),
        (CAR, objects(), {}, False, 0),
        (CAR, objects(car=[LEFT, RIGHT]), {0: ["red"]}, True, 0),  # the surest car is red
        (CARS, objects(car=[LEFT, RIGHT]), {0: ["red", "blue"]}, False, 3 / 4),
        (CARS, objects(car=[LEFT]), {}, False, 1 / 4),  # (1/2 + 0) / 2
        (BESIDE, objects(cat=[LEFT], dog=[RIGHT]), {}, True, 1),
        (BESIDE, objects(cat=[RIGHT], dog=[LEFT]), {}, False, 2 / 3),
        (BESIDE, objects(cat=[LEFT]), {}, False, 1 / 3),
        (BESIDE, objects(dog=[LEFT]), {}, False, 1 / 3),
        (BESIDE, objects(cat=[LEFT, RIGHT], dog=[MIDDLE]), {}, True, 1 / 3),
        (BY_RED, objects(dog=[LEFT], car=[RIGHT]), {0: ["red"]}, True, 1),
        (BY_RED, objects(dog=[LEFT], car=[RIGHT]), {0: ["blue"]}, False, 1 / 2),
        (BOTH, objects(car=[LEFT], bus=[RIGHT]), {0: ["red"], 1: ["blue"]}, True, 1),
        (BOTH, objects(car=[LEFT], bus=[RIGHT]), {0: ["blue"], 1: ["red"]}, False, 1 / 2),
        (BOTH, objects(car=[LEFT], bus=[RIGHT]), {0: ["red"], 1: ["red"]}, False, 3 / 4),
    ],
)
def test_scores_by_hand(task, found, colours, strict, graded):
    """Every tag, right and wrong. Mutation: exact counts in strict, or at-least counts in graded;
    forget `exclude`; a relation to a target of the wrong colour; clip graded at 0.
    """
    task = read_task(task)
    assert (first_fault(task, found, colours) is None) == strict
    assert share_fulfilled(task, found, colours) == pytest.approx(graded)


def test_every_pair_must_be_related():
    """Two cats left of a dog. Mutation: the first pair alone."""
    task = read_task(prompt("position", entry("dog"), entry("cat", 2, position=["left of", 0])))
    found = objects(dog=[MIDDLE], cat=[LEFT, RIGHT])
    assert first_fault(task, found, {}) == "cat: not left of what entry 0 asks for"
    assert share_fulfilled(task, found, {}) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("found", "colours", "fault"),
    [
        (objects(bus=[LEFT]), {1: ["blue"]}, "car: 0 found, 1 wanted"),
        (objects(bus=[LEFT], car=[LEFT]), {0: ["pink"], 1: ["blue"]}, "car: pink, red wanted"),
    ],
)
def test_faults_are_named(found, colours, fault):
    """Mutation: name the last one."""
    assert first_fault(read_task(BOTH), found, colours) == fault
    assert "4 found, fewer than 4" in first_fault(
        read_task(CUPS), objects(cup=[LEFT, MIDDLE, RIGHT, RIGHT]), {}
    )


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (square(10, 10, 20), square(70, 10, 20), {"left of"}),  # -(60 - 4) / 60
        (square(70, 10, 20), square(10, 10, 20), {"right of"}),
        (square(10, 10, 20), square(10, 70, 20), {"above"}),
        (square(10, 70, 20), square(10, 10, 20), {"below"}),
        (square(0, 0, 2), square(30, 30, 2), {"left of", "above"}),  # -29.6 / 42.4 on each axis
        (square(0, 0, 100), square(15, 0, 100), set()),  # within the dead zone of 20
        (square(0, 0, 100), square(40, 0, 100), set()),  # (40 - 20) / 40 is no more than 1/2
        (square(0, 0, 100), square(41, 0, 100), {"left of"}),
        (square(0, 0, 2), square(30, 10, 2), {"left of"}),  # up: -(10 - 0.4) / 31.6
        (square(0, 0, 10), square(0, 0, 10), set()),
    ],
)
def test_relations_by_hand(a, b, expected):
    """Mutation: no dead zone, the size of one box alone, another share of the distance, or y
    upwards.
    """
    assert relations(a, b) == expected


def test_the_dead_zone_is_that_of_both_boxes_along_the_axis():
    """A wide box and a narrow one: 0.1 (100 + 10) of 20. Mutation: the height on both axes."""
    wide, narrow = (0, 0, 100, 10), (65, 0, 75, 10)
    assert relations(wide, narrow) == set()  # -(20 - 11) / 20
    assert relations(wide, (75, 0, 85, 10)) == {"left of"}  # -(30 - 11) / 30


def test_the_surest_are_looked_at_for_colours():
    """As many as are asked for, where there are as many. Mutation: all of a class, or too few."""
    found = objects(car=[LEFT, RIGHT, MIDDLE])
    assert [d.box for d in to_be_coloured(read_task(CARS), found)[0]] == [LEFT, RIGHT]
    assert to_be_coloured(read_task(CARS), objects(car=[LEFT])) == {}
    assert to_be_coloured(read_task(DOG), objects(dog=[LEFT])) == {}
