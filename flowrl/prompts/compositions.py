"""Training prompts are drawn in the manner of GenEval2, with their questions: objects, counts,
colours, materials, positions.

GenEval2 (Kamath et al. 2025, arXiv 2512.16853) publishes 800 test prompts and no training split.
These are drawn from a grammar and a vocabulary of our own, in its format: an atom is an object, an
attribute, a count above one or a position; `vqa_list` asks for each of them, and for the count of a
single object too, which is no atom.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from flowrl.errors import UserError
from flowrl.prompts.jsonl import jsonl_prompts
from flowrl.types import Prompt
from flowrl.values.bounds import Prompts, Seed, Split, Text
from flowrl.values.check import checked

_NOUNS = (
    "apple ball banana barrel basket bear bicycle bird boat book bottle bowl bucket candle car "
    "carrot cat chair clock cow cup dog donkey drum duck elephant flower frog guitar hammer hat "
    "horse kettle kite ladder lamp lantern lemon lion mug owl pencil penguin piano pig pillow "
    "pizza plate pumpkin rabbit robot rocket shoe spoon suitcase table teapot tent tiger train "
    "tree trumpet truck turtle umbrella vase violin wheel zebra"
)
OBJECTS = {noun: f"{noun}s" for noun in _NOUNS.split()}
OBJECTS |= {
    "bench": "benches",
    "brush": "brushes",
    "bus": "buses",
    "cherry": "cherries",
    "fox": "foxes",
}
"""The plural of each singular."""
COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "orange",
    "purple",
    "pink",
    "white",
    "black",
    "brown",
    "grey",
)
MATERIALS = ("wooden", "metal", "plastic", "glass", "stone", "paper", "knitted", "ceramic")
RELATIONS = (
    "in front of",
    "behind",
    "to the left of",
    "to the right of",
    "on top of",
    "under",
    "above",
    "below",
)
COUNTS = ("one", "two", "three", "four", "five", "six", "seven")
MAX_OBJECTS = 3
MAX_ATOMS = 4 * MAX_OBJECTS - 1
"""Atoms of objects that have an attribute and a count each, and a position between each two."""
RESERVED = 8
"""One composition in this many belongs to the split `test`."""
Asked = frozenset[tuple[str, str]]
"""Questions with their answers, in lower case."""
PATIENCE = 10_000
"""Draws without a new prompt after which a set is taken to be exhausted."""
Atoms = Annotated[int, Ge(1), Le(MAX_ATOMS)]


@dataclass(frozen=True, slots=True)
class Phrase:
    """A phrase that means `count` objects called `noun`, with a colour or a material where
    `attribute` is not empty.
    """

    count: int
    attribute: str
    noun: str

    @property
    def name(self) -> str:
        """Return the noun in its number."""
        return self.noun if self.count == 1 else OBJECTS[self.noun]

    @property
    def text(self) -> str:
        """Write the phrase with its article or number."""
        words = f"{self.attribute} {self.name}".strip()
        if self.count > 1:
            return f"{COUNTS[self.count - 1]} {words}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    @property
    def the(self) -> str:
        """Write the phrase as the subject of a question, with its verb."""
        return f"{'Is' if self.count == 1 else 'Are'} the {self.name}"


@dataclass(frozen=True, slots=True)
class Composition:
    """A composition of one to three phrases; `relations[i]` is where phrase i is relative to phrase
    i + 1, or empty.
    """

    phrases: tuple[Phrase, ...]
    relations: tuple[str, ...]

    @property
    def text(self) -> str:
        """Write the composition as a prompt."""
        texts = [phrase.text for phrase in self.phrases]
        # Phrases that are not there are empty, and then no case below uses them.
        first, second, third = (*texts, "", "")[:3]
        match self.relations:
            case ():
                return first
            case (relation,):
                return f"{first} {relation or 'and'} {second}"
            case ("", ""):
                return f"{first}, {second} and {third}"
            case ("", relation):
                return f"{first}, and {second} {relation} {third}"
            case (relation, ""):
                return f"{first} {relation} {second}, and {third}"
            case (relation, other):
                # "a behind b under c" would leave open who is under c.
                return (
                    f"{first} {relation} {second}, with the {self.phrases[1].name} {other} {third}"
                )
        raise AssertionError(self)

    @property
    def questions(self) -> list[tuple[str, str, str]]:
        """Return (skill, question, answer) of everything that the text says."""
        asked = []
        for i, phrase in enumerate(self.phrases):
            plural = OBJECTS[phrase.noun]
            number = COUNTS[phrase.count - 1]
            asked.append(("count", f"How many {plural} are in the image?", number))
            if phrase.attribute:
                asked.append(("attribute", f"{phrase.the} {phrase.attribute}?", "Yes"))
            asked.append(("object", f"Are there any {plural} in the image?", "Yes"))
            if i < len(self.relations) and self.relations[i]:
                place = f"{self.relations[i]} the {self.phrases[i + 1].name}"
                asked.append(("position", f"{phrase.the} {place}?", "Yes"))
        return asked

    @property
    def num_atoms(self) -> int:
        """Count objects, attributes, counts above one and positions."""
        # True counts as one.
        atoms = [1 + bool(phrase.attribute) + (phrase.count > 1) for phrase in self.phrases]
        return sum(atoms) + sum(map(bool, self.relations))

    @property
    def prompt(self) -> Prompt:
        """Return the prompt with its metadata in GenEval2's format."""
        pairs = [[question, answer] for _, question, answer in self.questions]
        skills = [skill for skill, _, _ in self.questions]
        metadata = {"atom_count": self.num_atoms, "vqa_list": pairs, "skills": skills}
        return Prompt(self.text, f"atom_count_{self.num_atoms}", metadata)


def sample_composition(num_atoms: int, rng: random.Random) -> Composition:
    """Draw a composition of `num_atoms` atoms, 1 to `MAX_ATOMS`, all its objects different."""
    # k objects leave 3 k - 1 things that may be said or not: k attributes, k counts, k - 1
    # positions.
    options = [k for k in range(1, MAX_OBJECTS + 1) if k <= num_atoms <= 4 * k - 1]
    k = rng.choice(options)
    # The things that are said, by number: attributes from 0, counts from k, positions from 2 k.
    said = set(rng.sample(range(3 * k - 1), num_atoms - k))
    nouns = rng.sample(sorted(OBJECTS), k)
    phrases = []
    for i, noun in enumerate(nouns):
        attribute = ""
        if i in said:
            # Colours and materials are as likely, though there are more colours.
            attributes = rng.choice((COLOURS, MATERIALS))
            attribute = rng.choice(attributes)
        count = rng.randint(2, len(COUNTS)) if k + i in said else 1
        phrases.append(Phrase(count, attribute, noun))
    relations = []
    for i in range(k - 1):
        relations.append(rng.choice(RELATIONS) if 2 * k + i in said else "")
    return Composition(tuple(phrases), tuple(relations))


@checked("prompts")
def composition_prompts(
    *,
    split: Split,
    count: Prompts,
    seed: Seed,
    min_atoms: Atoms,
    max_atoms: Atoms,
    exclude: Text | None,
) -> list[Prompt]:
    """Draw `count` different prompts of a split, in equal shares of `min_atoms` to `max_atoms`
    atoms.

    What a composition asks decides its split, so that sets of both never overlap, whatever their
    seeds and sizes: neither a text nor a set of questions and answers is in both. Nor is one, apart
    from case, spaces and punctuation, in `exclude`, a GenEval2 file. Raises UserError where the
    split does not have so many prompts.
    """
    if min_atoms > max_atoms:
        raise UserError(
            f"prompts.min_atoms={min_atoms} must be at most prompts.max_atoms={max_atoms}"
        )
    # Prompts of the file count as drawn already.
    taken = _marks_of_file(exclude) if exclude else set()
    rng = random.Random(f"compositions {split} {seed}")
    prompts: list[Prompt] = []
    num_misses = 0
    num_sizes = max_atoms - min_atoms + 1
    while len(prompts) < count:
        num_atoms = min_atoms + len(prompts) % num_sizes
        prompt = sample_composition(num_atoms, rng).prompt
        words, asked = _marks(prompt)
        if words in taken or asked in taken or _split(asked) != split:
            num_misses += 1
            if num_misses > PATIENCE:
                raise UserError(
                    f"count={count}: there are only {len(prompts)} different prompts to be found"
                )
            continue
        num_misses = 0
        taken |= {words, asked}
        prompts.append(prompt)
    return prompts


def _marks_of_file(path: str) -> set[str | Asked]:
    """Collect the marks of the prompts in a GenEval2 file."""
    if not Path(path).expanduser().is_file():
        raise UserError(
            f"prompts exclude={path}: no such file; give GenEval2's jsonl file, or null"
        )
    marks = set[str | Asked]()
    for prompt in jsonl_prompts(path=path, text="prompt", family=None, required=["vqa_list"]):
        marks |= set(_marks(prompt))
    return marks


def _marks(prompt: Prompt) -> tuple[str, Asked]:
    """Return what makes two prompts the same: their words, and their questions with the answers."""
    words = re.findall(r"\w+", prompt.text.lower())
    pairs = prompt.metadata["vqa_list"]
    asked = frozenset((question.lower(), answer.lower()) for question, answer in pairs)
    return " ".join(words), asked


def _split(asked: Asked) -> str:
    """Name the split of some questions, by a digest, which no seed and no run of Python changes, as
    runs change `hash`.
    """
    digest = hashlib.sha256(repr(sorted(asked)).encode()).digest()
    return "test" if digest[0] % RESERVED == 0 else "train"
