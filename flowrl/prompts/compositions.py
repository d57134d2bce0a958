"""Training prompts in the manner of GenEval2, with their questions: objects, counts, colours,
materials, positions.

GenEval2 (Kamath et al. 2025, arXiv 2512.16853) publishes 800 test prompts and no training split.
These are drawn from a grammar and a vocabulary of our own, in its format: an atom is an object, an
attribute, a count above one or a position; `vqa_list` asks for each of them, and for the count of a
single object too, which is no atom.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowrl.errors import UserError
from flowrl.prompts.jsonl import jsonl_prompts
from flowrl.types import Prompt
from flowrl.values.bounds import Count, Prompts, Seed, Split, Text

_NOUNS = (
    "apple ball banana barrel basket bear bicycle bird boat book bottle bowl bucket candle car "
    "carrot cat chair "
    "clock cow cup dog donkey drum duck elephant flower frog guitar hammer hat horse kettle kite "
    "ladder lamp "
    "lantern lemon lion mug owl pencil penguin piano pig pillow pizza plate pumpkin rabbit robot "
    "rocket shoe "
    "spoon suitcase table teapot tent tiger train tree trumpet truck turtle umbrella vase violin "
    "wheel zebra"
)
OBJECTS = {noun: f"{noun}s" for noun in _NOUNS.split()}
OBJECTS |= {
    "bench": "benches",
    "brush": "brushes",
    "bus": "buses",
    "cherry": "cherries",
    "fox": "foxes",
}
"""Singular and plural."""
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
"""Every object with an attribute and a count, and a position between each two."""
RESERVED = 8
"""One composition in this many belongs to the split `test`."""
Asked = frozenset[tuple[str, str]]
"""Questions with their answers, in lower case."""
PATIENCE = 10_000
"""Draws without a new prompt after which a set is taken to be exhausted."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """`count` objects called `noun`, with a colour or a material where `attribute` is not empty."""

    count: int
    attribute: str
    noun: str

    @property
    def name(self) -> str:
        """The noun in its number."""
        return self.noun if self.count == 1 else OBJECTS[self.noun]

    @property
    def text(self) -> str:
        words = f"{self.attribute} {self.name}".strip()
        if self.count > 1:
            return f"{COUNTS[self.count - 1]} {words}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    @property
    def the(self) -> str:
        """As the subject of a question, with its verb."""
        return f"{'Is' if self.count == 1 else 'Are'} the {self.name}"


@dataclass(frozen=True, slots=True)
class Composition:
    """One to three phrases; `relations[i]` is where phrase i is relative to phrase i + 1, or
    empty.
    """

    phrases: tuple[Phrase, ...]
    relations: tuple[str, ...]

    @property
    def text(self) -> str:
        first, second, third = (*(phrase.text for phrase in self.phrases), "", "")[:3]
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
        """(skill, question, answer) of everything that the text says."""
        asked = []
        for i, phrase in enumerate(self.phrases):
            plural = OBJECTS[phrase.noun]
            asked.append(
                ("count", f"How many {plural} are in the image?", COUNTS[phrase.count - 1])
            )
            if phrase.attribute:
                asked.append(("attribute", f"{phrase.the} {phrase.attribute}?", "Yes"))
            asked.append(("object", f"Are there any {plural} in the image?", "Yes"))
            if i < len(self.relations) and self.relations[i]:
                asked.append(
                    (
                        "position",
                        f"{phrase.the} {self.relations[i]} the {self.phrases[i + 1].name}?",
                        "Yes",
                    )
                )
        return asked

    @property
    def num_atoms(self) -> int:
        has = [bool(phrase.attribute) + (phrase.count > 1) + 1 for phrase in self.phrases]
        return sum(has) + sum(map(bool, self.relations))

    @property
    def prompt(self) -> Prompt:
        """In GenEval2's format."""
        metadata = {
            "atom_count": self.num_atoms,
            "vqa_list": [[question, answer] for _, question, answer in self.questions],
            "skills": [skill for skill, _, _ in self.questions],
        }
        return Prompt(self.text, f"atom_count_{self.num_atoms}", metadata)


def sample_composition(num_atoms: int, rng: random.Random) -> Composition:
    """A composition of exactly `num_atoms` atoms, all its objects different."""
    # k objects leave 3 k - 1 things that may be said or not: k attributes, k counts, k - 1
    # positions.
    k = rng.choice([k for k in range(1, MAX_OBJECTS + 1) if k <= num_atoms <= 4 * k - 1])
    said = set(rng.sample(range(3 * k - 1), num_atoms - k))
    nouns = rng.sample(sorted(OBJECTS), k)
    phrases = []
    for i, noun in enumerate(nouns):
        attribute = rng.choice(rng.choice((COLOURS, MATERIALS))) if i in said else ""
        phrases.append(Phrase(rng.randint(2, len(COUNTS)) if k + i in said else 1, attribute, noun))
    return Composition(
        tuple(phrases),
        tuple(rng.choice(RELATIONS) if 2 * k + i in said else "" for i in range(k - 1)),
    )


def composition_prompts(
    *,
    split: Split,
    count: Prompts,
    seed: Seed,
    min_atoms: Count,
    max_atoms: Count,
    exclude: Text | None,
) -> list[Prompt]:
    """`count` different prompts of a split, in equal shares of `min_atoms` to `max_atoms` atoms.

    What a composition asks decides its split, so that sets of both never overlap, whatever their
    seeds and sizes: neither a text nor a set of questions and answers is in both. Nor is one, apart
    from case, spaces and punctuation, in `exclude`, a GenEval2 file.
    """
    if split not in ("train", "test"):
        raise UserError(f"split={split!r} must be train or test")
    if count < 1:
        raise UserError(f"count={count} must be at least 1")
    if not 1 <= min_atoms <= max_atoms <= MAX_ATOMS:
        raise UserError(
            f"min_atoms={min_atoms} and max_atoms={max_atoms} must be ordered and within 1 to "
            f"{MAX_ATOMS}"
        )
    taken = set[object]()
    if exclude:
        if not Path(exclude).expanduser().is_file():
            raise UserError(
                f"prompts exclude={exclude}: no such file; give GenEval2's jsonl file, or null"
            )
        for prompt in jsonl_prompts(
            path=exclude, text="prompt", family=None, required=["vqa_list"]
        ):
            taken |= set(_marks(prompt.text, prompt.metadata["vqa_list"]))
    rng = random.Random(f"compositions {split} {seed}")
    prompts: list[Prompt] = []
    num_misses = 0
    while len(prompts) < count:
        num_atoms = min_atoms + len(prompts) % (max_atoms - min_atoms + 1)
        prompt = sample_composition(num_atoms, rng).prompt
        words, asked = _marks(prompt.text, prompt.metadata["vqa_list"])
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


def _marks(text: str, questions: Sequence[Sequence[str]]) -> tuple[str, Asked]:
    """What makes two prompts the same: their words, or their questions with the answers."""
    asked = frozenset((pair[0].lower(), pair[1].lower()) for pair in questions)
    return " ".join(re.findall(r"\w+", text.lower())), asked


def _split(asked: Asked) -> str:
    """By a digest, which no seed and no run of Python changes."""
    digest = hashlib.sha256(repr(sorted(asked)).encode()).digest()
    return "test" if digest[0] % RESERVED == 0 else "train"
