"""The caption grammar of the shapes world: what can be said, how it is written, which part is held
out.

A caption is one or two noun phrases (count, optional colour, shape), joined by `and` or by a
spatial relation. The task families are those of GenEval (Ghosh et al. 2023, arXiv 2310.11513) plus
compositions of three to five atoms as in GenEval2. `parse` is the inverse of `Caption.text`, so a
prompt alone is enough to score.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from flowrl.errors import UserError

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = ("a", "two", "three", "four")
FAMILIES = ("single", "counting", "colour", "two_objects", "position", "binding", "composition")
MAX_OBJECTS = 4

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
    """One noun phrase: `count` objects of `shape`, in `colour` or in any colour (None)."""

    count: int
    colour: str | None
    shape: str

    @property
    def text(self) -> str:
        noun = self.shape if self.count == 1 else _PLURALS[self.shape]
        return " ".join(word for word in (COUNT_WORDS[self.count - 1], self.colour, noun) if word)


@dataclass(frozen=True, slots=True)
class Caption:
    """One phrase, or two joined by `and` or by a spatial `relation` (first relative to second)."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        return f" {self.relation or 'and'} ".join(phrase.text for phrase in self.phrases)

    @property
    def num_objects(self) -> int:
        return sum(phrase.count for phrase in self.phrases)

    @property
    def family(self) -> str:
        """The task family, decided by what the caption asks for."""
        has_count = any(phrase.count > 1 for phrase in self.phrases)
        has_colour = any(phrase.colour for phrase in self.phrases)
        if len(self.phrases) == 1:
            return {
                (False, False): "single",
                (True, False): "counting",
                (False, True): "colour",
            }.get((has_count, has_colour), "composition")
        if has_count or (self.relation and has_colour):
            return "composition"
        if self.relation:
            return "position"
        return "binding" if has_colour else "two_objects"

    @property
    def is_held_out(self) -> bool:
        """Whether RL training must never see this caption: it holds a reserved (colour, shape) or
        relation triple.
        """
        pair = any(
            p.colour and (COLOURS.index(p.colour) + 2 * SHAPES.index(p.shape)) % 6 == 0
            for p in self.phrases
        )
        if not self.relation:
            return pair
        first, second = (SHAPES.index(phrase.shape) for phrase in self.phrases)
        return pair or (first + RELATIONS.index(self.relation) + 2 * second) % 6 == 0


def parse(text: str) -> Caption:
    """Read a caption back from its text. Raises UserError, naming the word, for text outside the
    grammar.
    """
    relation = next((name for name in RELATIONS if f" {name} " in text), None)
    parts = text.split(f" {relation} " if relation else " and ")
    caption = Caption(tuple(_parse_phrase(part, text) for part in parts), relation)
    if caption.num_objects > MAX_OBJECTS or len(parts) > 2:
        raise UserError(
            f"prompt {text!r} is outside the shapes grammar: at most two phrases, {MAX_OBJECTS} "
            "objects"
        )
    return caption


def _parse_phrase(part: str, text: str) -> Phrase:
    words = part.split()
    colour = words[1] if len(words) == 3 else None
    shape = _SINGULARS.get(words[-1], words[-1]) if words else ""
    phrase_is_valid = (
        len(words) in (2, 3)
        and words[0] in COUNT_WORDS
        and shape in SHAPES
        and (colour is None or colour in COLOURS)
        and (words[-1] in SHAPES) == (words[0] == "a")
    )
    if not phrase_is_valid:
        raise UserError(
            f"prompt {text!r} is outside the shapes grammar: cannot read {part!r} as 'COUNT "
            "[COLOUR] SHAPE'"
        )
    return Phrase(COUNT_WORDS.index(words[0]) + 1, colour, shape)


def sample_caption(family: str, rng: random.Random) -> Caption:
    """Draw a caption of `family`; phrases of one caption never share a shape-colour description."""
    if family not in FAMILIES:
        raise UserError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    while True:
        caption = _draw(family, rng)
        kinds = [phrase.shape for phrase in caption.phrases]
        has_twins = len(set(kinds)) < len(kinds) and any(p.colour is None for p in caption.phrases)
        pairs = {(phrase.shape, phrase.colour) for phrase in caption.phrases}
        if not has_twins and len(pairs) == len(kinds) and caption.num_objects <= MAX_OBJECTS:
            return caption


def _draw(family: str, rng: random.Random) -> Caption:
    def phrase(count: int = 1, has_colour: bool = False) -> Phrase:
        return Phrase(count, rng.choice(COLOURS) if has_colour else None, rng.choice(SHAPES))

    # Arguments are drawn here and now, in one order per family, so that a seed always gives the
    # same captions.
    if family in ("single", "counting", "colour"):
        return Caption(
            (
                phrase(
                    rng.randint(2, MAX_OBJECTS) if family == "counting" else 1, family == "colour"
                ),
            )
        )
    if family in ("two_objects", "position", "binding"):
        phrases = (phrase(has_colour=family == "binding"), phrase(has_colour=family == "binding"))
        return Caption(phrases, rng.choice(RELATIONS) if family == "position" else None)
    form = rng.choice(("coloured count", "coloured relation", "counted pair", "counted relation"))
    if form == "coloured count":
        return Caption((phrase(rng.randint(2, MAX_OBJECTS), True),))
    if form == "coloured relation":
        return Caption((phrase(has_colour=True), phrase(has_colour=True)), rng.choice(RELATIONS))
    if form == "counted pair":
        return Caption((phrase(rng.randint(2, 3), True), phrase(1, True)))
    return Caption((phrase(2), phrase(1, True)), rng.choice(RELATIONS))


def corrupt(caption: Caption, rates: dict[str, float], rng: random.Random) -> Caption:
    """Replace words at fixed rates: each colour, shape and count independently, the relation once,
    or everything.

    `rates` has the keys colour, shape, count, relation, each a probability of replacement by
    another word, and caption, that of an unrelated caption. Pretraining on corrupted captions makes
    a model that draws well and follows its prompt unreliably, as noisy captions of the web do.
    """
    if rng.random() < rates["caption"]:
        return sample_caption(rng.choice(FAMILIES), rng)

    def other(value: str, options: tuple[str, ...]) -> str:
        return rng.choice([option for option in options if option != value])

    phrases: list[Phrase] = []
    for phrase in caption.phrases:
        if phrase.colour and rng.random() < rates["colour"]:
            phrase = replace(phrase, colour=other(phrase.colour, COLOURS))
        if rng.random() < rates["shape"]:
            phrase = replace(phrase, shape=other(phrase.shape, SHAPES))
        others = sum(p.count for p in (*phrases, *caption.phrases[len(phrases) + 1 :]))
        options = COUNT_WORDS[: MAX_OBJECTS - others]
        if rng.random() < rates["count"] and len(options) > 1:
            phrase = replace(
                phrase, count=COUNT_WORDS.index(other(COUNT_WORDS[phrase.count - 1], options)) + 1
            )
        phrases.append(phrase)
    relation = caption.relation
    if relation and rng.random() < rates["relation"]:
        relation = other(relation, RELATIONS)
    return Caption(tuple(phrases), relation)
