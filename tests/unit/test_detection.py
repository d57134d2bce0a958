"""Which detections count, and COCO's classes."""

import pytest
from geneval_cases import LEFT, RIGHT, square

from flowrl.rewards.detection import COCO, Detection, counted_by_name, overlap


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


def test_cocos_classes():
    """80 names in COCO's order. Mutation: a space or a line's end within one."""
    assert len(set(COCO)) == 80
    assert all(name == " ".join(name.split()) for name in COCO)
    numbers = {"person": 0, "stop sign": 11, "computer mouse": 64, "tv remote": 65}
    numbers |= {"computer keyboard": 66, "toothbrush": 79}
    assert {name: COCO.index(name) for name in numbers} == numbers
