"""The caption grammar of the shapes world says what can be said, how it is written, and which
captions are held out.

A caption is one or two noun phrases (count, optional colour, shape), joined by `and` or by a
spatial relation. The task families are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513) plus
compositions of three to five atoms as in GenEval2. `parse` is the inverse of `Caption.text`, so a
prompt alone is enough to score.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from flowrl.errors import UserError

Option = TypeVar("Option", int, str)

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = ("a", "two", "three", "four")
FAMILIES = ("single", "counting", "colour", "two_objects", "position", "binding", "composition")
MAX_OBJECTS = 4

_SINGLE_FAMILIES = {
    (False, False, False): "single",
    (True, False, False): "counting",
    (False, True, False): "colour",
}
_PAIR_FAMILIES = {
    (False, False, False): "two_objects",
    (False, True, False): "binding",
    (False, False, True): "position",
}
"""Task families by what a caption of one or two phrases asks for: a count above one, a colour, a
relation. Whatever else is asked is a composition.
"""
_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}
WORDS = (
    *COUNT_WORDS,
    *COLOURS,
    *SHAPES,
    *_SINGULARS,
    "and",
    "left",
    "right",
    "of",
    "above",
    "below",
)


@dataclass(frozen=True, slots=True)
class Phrase:
    """One noun phrase, which means `count` objects of `shape`, in `colour` or in any (None)."""

    count: int
    colour: str | None
    shape: str

    @property
    def text(self) -> str:
        """Write the phrase as it stands in a caption."""
        noun = self.shape if self.count == 1 else _PLURALS[self.shape]
        number = COUNT_WORDS[self.count - 1]
        if self.colour is None:
            return f"{number} {noun}"
        return f"{number} {self.colour} {noun}"


@dataclass(frozen=True, slots=True)
class Caption:
    """One phrase, or two joined by `and` or by a spatial `relation` (first relative to second)."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """Write the caption, which `parse` reads back."""
        link = self.relation or "and"
        return f" {link} ".join(phrase.text for phrase in self.phrases)

    @property
    def num_objects(self) -> int:
        """Count the objects that the caption asks for."""
        return sum(phrase.count for phrase in self.phrases)

    @property
    def family(self) -> str:
        """Name the task family, decided by what the caption asks for."""
        has_counts = any(phrase.count > 1 for phrase in self.phrases)
        has_colours = any(phrase.colour for phrase in self.phrases)
        has_relation = self.relation is not None
        families = _SINGLE_FAMILIES if len(self.phrases) == 1 else _PAIR_FAMILIES
        return families.get((has_counts, has_colours, has_relation), "composition")

    @property
    def is_held_out(self) -> bool:
        """Tell whether RL training must never see this caption: it holds a reserved (colour, shape)
        or relation triple.
        """
        if any(_is_reserved(phrase) for phrase in self.phrases):
            return True
        if self.relation is None:
            return False
        # As with colours, about one triple in six: each word stands in triples of both kinds.
        first, second = (SHAPES.index(phrase.shape) for phrase in self.phrases)
        relation = RELATIONS.index(self.relation)
        return (first + relation + 2 * second) % 6 == 0


def _is_reserved(phrase: Phrase) -> bool:
    """Tell whether a phrase's (colour, shape) is reserved: one colour of the six for each shape."""
    if phrase.colour is None:
        return False
    colour = COLOURS.index(phrase.colour)
    shape = SHAPES.index(phrase.shape)
    return (colour + 2 * shape) % 6 == 0


def parse(text: str) -> Caption:
    """Read a caption back from its text. Raises UserError, naming the phrase, for text outside the
    grammar.
    """
    relation = next((name for name in RELATIONS if f" {name} " in text), None)
    link = relation or "and"
    phrase_texts = text.split(f" {link} ")
    phrases = tuple(_parse_phrase(phrase_text, text) for phrase_text in phrase_texts)
    caption = Caption(phrases, relation)
    if caption.num_objects > MAX_OBJECTS or len(phrases) > 2:
        raise UserError(
            f"prompt {text!r} is outside the shapes grammar: at most two phrases, {MAX_OBJECTS} "
            "objects"
        )
    return caption


def _parse_phrase(phrase_text: str, text: str) -> Phrase:
    """Read one phrase of a text back; a phrase says what it means in one way alone."""
    words = phrase_text.split()
    if len(words) in (2, 3) and words[0] in COUNT_WORDS:
        colour = words[1] if len(words) == 3 else None
        shape = _SINGULARS.get(words[-1], words[-1])
        if shape in SHAPES and colour in (None, *COLOURS):
            count = COUNT_WORDS.index(words[0]) + 1
            phrase = Phrase(count, colour, shape)
            # Writing it again refuses `two circle` and `a circles`: the noun goes with the count.
            if phrase.text.split() == words:
                return phrase
    raise UserError(
        f"prompt {text!r} is outside the shapes grammar: cannot read {phrase_text!r} as 'COUNT "
        "[COLOUR] SHAPE'"
    )


def sample_caption(family: str, rng: random.Random) -> Caption:
    """Draw a caption of `family`; phrases of one caption never share a shape-colour description.

    Raises UserError for a family that is none of `FAMILIES`.
    """
    if family not in FAMILIES:
        raise UserError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    # Captions that cannot be used are drawn again, whole: mending them would favour some words.
    while True:
        caption = _draw(family, rng)
        if caption.num_objects <= MAX_OBJECTS and _tells_apart(caption.phrases):
            return caption


def _tells_apart(phrases: tuple[Phrase, ...]) -> bool:
    """Tell whether no object fits two of the phrases: of one shape, they differ in colour."""
    shapes = {phrase.shape for phrase in phrases}
    if len(shapes) == len(phrases):
        return True
    # A phrase without a colour means any, and so the other phrase's objects too.
    colours = {phrase.colour for phrase in phrases}
    return len(colours) == len(phrases) and None not in colours


# Words are drawn in one order per family, so that a seed always gives the same captions.


def _draw(family: str, rng: random.Random) -> Caption:
    """Draw a caption of a family, whose phrases may mean the same object."""
    match family:
        case "single":
            return Caption((_draw_phrase(rng),))
        case "counting":
            return Caption((_draw_phrase(rng, rng.randint(2, MAX_OBJECTS)),))
        case "colour":
            return Caption((_draw_phrase(rng, has_colour=True),))
        case "two_objects":
            return Caption((_draw_phrase(rng), _draw_phrase(rng)))
        case "position":
            phrases = (_draw_phrase(rng), _draw_phrase(rng))
            return Caption(phrases, rng.choice(RELATIONS))
        case "binding":
            first = _draw_phrase(rng, has_colour=True)
            second = _draw_phrase(rng, has_colour=True)
            return Caption((first, second))
    return _draw_composition(rng)


def _draw_composition(rng: random.Random) -> Caption:
    """Draw a caption that asks for two or three things at once, of three to five atoms."""
    match rng.choice(("coloured count", "coloured relation", "counted pair", "counted relation")):
        case "coloured count":
            return Caption((_draw_phrase(rng, rng.randint(2, MAX_OBJECTS), has_colour=True),))
        case "coloured relation":
            first = _draw_phrase(rng, has_colour=True)
            second = _draw_phrase(rng, has_colour=True)
            return Caption((first, second), rng.choice(RELATIONS))
        case "counted pair":
            first = _draw_phrase(rng, rng.randint(2, 3), has_colour=True)
            second = _draw_phrase(rng, has_colour=True)
            return Caption((first, second))
    # A counted relation has two objects at most, since three beside a fourth have no layout.
    first = _draw_phrase(rng, 2)
    second = _draw_phrase(rng, has_colour=True)
    return Caption((first, second), rng.choice(RELATIONS))


def _draw_phrase(rng: random.Random, count: int = 1, *, has_colour: bool = False) -> Phrase:
    """Draw the colour, where the phrase has one, and then the shape."""
    colour = rng.choice(COLOURS) if has_colour else None
    return Phrase(count, colour, rng.choice(SHAPES))


def corrupt(caption: Caption, rates: dict[str, float], rng: random.Random) -> Caption:
    """Replace words at fixed rates: each colour, shape and count independently, the relation once,
    or everything.

    `rates` has the keys colour, shape, count, relation, each a probability of replacement by
    another word, and caption, that of an unrelated caption. Pretraining on corrupted captions makes
    a model that draws well and follows its prompt unreliably, as noisy captions of the web do.
    """
    if rng.random() < rates["caption"]:
        return sample_caption(rng.choice(FAMILIES), rng)

    # A new count leaves room for the other phrases, as they are by then, within MAX_OBJECTS.
    num_objects = caption.num_objects
    phrases = []
    for phrase in caption.phrases:
        num_others = num_objects - phrase.count
        max_count = MAX_OBJECTS - num_others
        corrupted = _corrupt_phrase(phrase, max_count, rates, rng)
        num_objects = num_others + corrupted.count
        phrases.append(corrupted)
    relation = caption.relation
    if relation and rng.random() < rates["relation"]:
        relation = _draw_other(relation, RELATIONS, rng)
    return Caption(tuple(phrases), relation)


def _corrupt_phrase(
    phrase: Phrase, max_count: int, rates: dict[str, float], rng: random.Random
) -> Phrase:
    """Replace the phrase's words at their rates; the count by one of at most `max_count`."""
    colour = phrase.colour
    if colour and rng.random() < rates["colour"]:
        colour = _draw_other(colour, COLOURS, rng)
    shape = phrase.shape
    if rng.random() < rates["shape"]:
        shape = _draw_other(shape, SHAPES, rng)
    count = phrase.count
    if rng.random() < rates["count"] and max_count > 1:
        count = _draw_other(count, range(1, max_count + 1), rng)
    return Phrase(count, colour, shape)


def _draw_other(value: Option, options: Iterable[Option], rng: random.Random) -> Option:
    others = [option for option in options if option != value]
    return rng.choice(others)
