"""Prompts of GenEval's tasks, and the boxes of objects, by hand."""

from flowrl.types import Prompt

LEFT, MIDDLE, RIGHT = (0, 0, 20, 20), (60, 0, 80, 20), (120, 0, 140, 20)


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


def square(x, y, side):
    return (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
