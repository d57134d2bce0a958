"""GenEval's scores of objects that are given by hand, by the published rules."""

import pytest

from flowrl.errors import UserError
from flowrl.rewards.detection import COCO, Detection, counted_by_name, overlap
from flowrl.rewards.geneval_task import (
    Clause,
    Task,
    first_fault,
    read_task,
    relations,
    share_fulfilled,
    to_be_coloured,
)
from flowrl.types import Prompt

LEFT, MIDDLE, RIGHT = (0, 0, 20, 20), (60, 0, 80, 20), (120, 0, 140, 20)


def objects(**boxes):
    """Detections of each class, all of one score; `stop_sign` is a stop sign."""
    found = {}
    for word, places in boxes.items():
        name = word.replace("_", " ")
        found[name] = [Detection(name, 0.5, place) for place in places]
    return found


def prompt(tag, *include, exclude=()):
    metadata = {"tag": tag, "include": list(include)}
    return Prompt("a photo", tag, metadata | ({"exclude": list(exclude)} if exclude else {}))


def entry(name, count=1, **more):
    return {"class": name, "count": count} | more


DOG = prompt("single_object", entry("dog"))
PETS = prompt("two_object", entry("dog"), entry("cat"))
CUPS = prompt("counting", entry("cup", 3), exclude=[entry("cup", 4)])
CAR = prompt("colors", entry("car", color="red"))
CARS = prompt("colors", entry("car", 2, color="red"))
BESIDE = prompt("position", entry("dog"), entry("cat", position=["left of", 0]))
BY_RED = prompt("position", entry("car", color="red"), entry("dog", position=["left of", 0]))
BOTH = prompt("color_attr", entry("car", color="red"), entry("bus", color="blue"))


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


def square(x, y, side):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)


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


def test_overlap_by_hand():
    """Boxes of 10 x 10 pixels. Mutation: leave the last pixel out, or divide by one area."""
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0


def counted(*detections, **options):
    options = {"threshold": 0.3, "max_overlap": 0.5, "max_objects": 16} | options
    found = counted_by_name([Detection(*detection) for detection in detections], **options)
    return {name: [detection.score for detection in of_name] for name, of_name in found.items()}


def test_which_detections_count():
    """Mutation: count the threshold itself, keep the order of the detector, or suppress a dog
    beside a cat.
    """
    box, half, other = (0, 0, 9, 9), (0, 0, 9, 4), (50, 0, 59, 9)
    assert counted(("dog", 0.3, box)) == {}
    assert counted(("dog", 0.4, other), ("dog", 0.9, box)) == {"dog": [0.9, 0.4]}
    assert counted(("dog", 0.4, box), ("cat", 0.9, box)) == {"cat": [0.9], "dog": [0.4]}
    # They share 50 of 100 pixels, which is what suppresses.
    assert counted(("dog", 0.4, half), ("dog", 0.9, box)) == {"dog": [0.9]}
    assert counted(("dog", 0.4, half), ("dog", 0.9, box), max_overlap=0.51) == {"dog": [0.9, 0.4]}
    assert counted(("dog", 0.4, box), ("dog", 0.9, box), max_overlap=1) == {"dog": [0.9, 0.4]}


def test_at_most_sixteen_objects_count_of_those_that_are_not_suppressed():
    """Mutation: no limit, or take the surest before suppressing."""
    apart = [("cup", 0.9 - 0.01 * i, square(100 * i, 0, 10)) for i in range(20)]
    assert len(counted(*apart, max_objects=16)["cup"]) == 16
    repeated = [("cup", 0.9, LEFT)] * 20 + [("cup", 0.4, RIGHT)]
    assert counted(*repeated, max_objects=16) == {"cup": [0.9, 0.4]}


def test_the_surest_are_looked_at_for_colours():
    """As many as are asked for, where there are as many. Mutation: all of a class, or too few."""
    found = objects(car=[LEFT, RIGHT, MIDDLE])
    assert [d.box for d in to_be_coloured(read_task(CARS), found)[0]] == [LEFT, RIGHT]
    assert to_be_coloured(read_task(CARS), objects(car=[LEFT])) == {}
    assert to_be_coloured(read_task(DOG), objects(dog=[LEFT])) == {}


def test_a_task_is_read():
    """Positions come as lists from JSON. Mutation: lose the exclusion, or the target's number."""
    assert read_task(CUPS) == Task("counting", (Clause("cup", 3),), (Clause("cup", 4),))
    assert read_task(BESIDE).include[1] == Clause("cat", 1, None, "left of", 0)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "its metadata lack `tag` or `include`, as data=geneval has them"),
        ({"tag": "position"}, "its metadata lack `tag` or `include`"),
        ({"tag": "style", "include": [entry("dog")]}, "tag='style' is none of single_object"),
        ({"tag": ["colors"], "include": [entry("dog")]}, "is none of single_object"),
        ({"tag": "colors", "include": []}, "`include` names no object"),
        ({"tag": "colors", "include": "dog"}, "`include` is no list"),
        ({"tag": "colors", "include": ["dog"]}, r"include\[0\] is no object with a `class`"),
        ({"tag": "colors", "include": [entry("dog", 0)]}, "count=0 is no whole number"),
        ({"tag": "colors", "include": [entry("dog", True)]}, "count=True is no whole number"),
        ({"tag": "colors", "include": [entry("dog", color="teal")]}, "color='teal' is none of red"),
        ({"tag": "position", "include": [entry("dog", position=["near", 0])]}, "is no pair of"),
        ({"tag": "position", "include": [entry("dog", position=["above", 0])]}, "an earlier entry"),
        ({"tag": "counting", "include": [entry("dog")], "exclude": [{}]}, r"exclude\[0\] is no"),
    ],
)
def test_other_metadata_are_refused_in_one_line(metadata, words):
    """Mutation: take an unknown tag for one that is not counting."""
    with pytest.raises(UserError, match=words) as caught:
        read_task(Prompt("a photo", "", metadata))
    assert str(caught.value).startswith("prompt 'a photo': ")
    assert "\n" not in str(caught.value)


def test_cocos_classes():
    """80 names in COCO's order. Mutation: a space or a line's end within one."""
    assert len(set(COCO)) == 80
    assert all(name == " ".join(name.split()) for name in COCO)
    numbers = {"person": 0, "stop sign": 11, "computer mouse": 64, "tv remote": 65}
    numbers |= {"computer keyboard": 66, "toothbrush": 79}
    assert {name: COCO.index(name) for name in numbers} == numbers
