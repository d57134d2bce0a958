"""Write the configuration reference from the files of conf/ and what their targets say of a key.

    python scripts/config_page.py            # prints the page; the site builds it by itself

A key's meaning is the comment behind it or above it, else that of the same key elsewhere, else its
line in docs/reference/keys.yaml; what it may be is its hint in words, as the program's messages
have it.
Imported are `flowrl.launch` (compose, schema, signatures), `flowrl.values.wording` and all targets.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from flowrl.launch.compose import CONF
from flowrl.launch.schema import Node, Settings
from flowrl.launch.signatures import foreign_of, hints_of, import_target
from flowrl.values.wording import describe

GROUPS = {
    "sampler": "How a velocity becomes the Gaussian of a step.",
    "steps": "Which steps of a rollout are stochastic, and so trained on.",
    "schedule": "The grid of sigmas.",
    "loss": "The policy loss.",
    "penalty": "The distance to the frozen reference that is added to the loss.",
    "advantage": "How rewards become advantages.",
    "optimizer": "What turns gradients into steps.",
    "learning_rate": "The course of the learning rate over the run.",
    "model": "The base model.",
    "backend": "How a model is computed; a model chooses its own.",
    "tuning": "Which weights are trained.",
    "reward": "What is rewarded.",
    "data": "The training prompts.",
    "evaluation": "The prompts of evaluations; most prompt sets bring their own.",
    "experiment": "Whole methods, as recipes.",
    "debug": "Runs that only show that everything works.",
    "trainer": "Devices and strategies.",
    "logger": "Trackers.",
    "callbacks": "Additions to the loop.",
    "http": "How scoring servers are asked: the key `client` of the rewards that ask one.",
    "hydra/launcher": "Where the jobs of a sweep run.",
    "hydra/sweeper": "How the jobs of a sweep are chosen.",
}
"""The groups in the page's order, each with a sentence; others follow without one."""

KEYS = Path(__file__).parents[1] / "docs" / "reference" / "keys.yaml"
PARAGRAPHS_END = re.compile(r"\n\s*\n")


@dataclass
class Key:
    """A key of a file: its whole name, default and comment, and the target of its node."""

    name: str
    value: str
    comment: str
    target: str | None


@dataclass
class Option:
    """A file of conf/ as the page shows it."""

    path: Path
    is_global: bool = False
    head: list[str] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    defaults: list[str] = field(default_factory=list)

    @property
    def group(self) -> str:
        """The group's name, empty for files that stand directly in conf/."""
        return self.path.parent.relative_to(CONF).as_posix().removeprefix(".")


def read(path: Path) -> Option:
    """Read one file with its comments."""
    text = path.read_text()
    option = Option(path)
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        words = line.removeprefix("#").strip()
        option.is_global |= words == "@package _global_"
        if not words.startswith("@package"):
            option.head.append(words)
    option.defaults = [_chosen(item) for item in (yaml.safe_load(text) or {}).get("defaults", [])]
    root = yaml.compose(text)
    prefix = "" if option.is_global or not option.group else option.group.replace("/", ".")
    if isinstance(root, yaml.MappingNode):
        _collect(root, prefix, text, option, None)
    return option


def _collect(
    node: yaml.MappingNode, prefix: str, text: str, option: Option, outer: str | None
) -> None:
    """Add the keys of a mapping, and of those below it, to the option."""
    texts = {key.value: value for key, value in node.value}
    target = outer
    if "_target_" in texts:
        target = option.targets[prefix] = str(texts["_target_"].value)
    for key, value in node.value:
        if key.value == "defaults" or key.value.startswith("_"):
            continue
        name = f"{prefix}.{key.value}".removeprefix(".")
        comment = _comment(node, key, value, text.splitlines())
        if isinstance(value, yaml.MappingNode) and value.value:
            # Behind a mapping of one key on one line, a comment is that key's.
            if comment and not (value.flow_style and len(value.value) == 1):
                option.keys.append(Key(name, "", comment, target))
            _collect(value, name, text, option, None)
        else:
            option.keys.append(Key(name, _source(value, text), comment, target))


def _source(node: yaml.Node, text: str) -> str:
    """Return a node as it is written, on one line."""
    return " ".join(text[node.start_mark.index : node.end_mark.index].split())


def _chosen(item: Any) -> str:
    """Write an entry of a list of defaults as one chooses it on the command line."""
    if isinstance(item, str):
        return item
    [(name, choice)] = item.items()
    group = name.removeprefix("override ").removeprefix("/").partition("@")[0]
    return f"{group}={'null' if choice is None else choice}"


def _comment(outer: yaml.MappingNode, key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    """Return the comment behind a key's value, or above a key of the outermost mapping."""
    is_block = value.start_mark.line != value.end_mark.line
    end = key.end_mark if is_block else value.end_mark
    # Several keys on one line share the comment behind them, which then is their mapping's.
    closing = r"[}\]\s]*" if outer.flow_style and len(outer.value) == 1 else r"[:\s]*"
    behind = re.match(closing + r"# (.*)", lines[end.line][end.column :])
    if behind is not None:
        return behind[1].strip()
    above = key.start_mark.line - 1
    is_apart = above > 0 and not lines[above - 1].strip()
    if key.start_mark.column == 0 and is_apart and lines[above].startswith("# "):
        return lines[above].removeprefix("# ").strip()
    return ""


class Reference:
    """All files of conf/, and what is said anywhere of a key."""

    def __init__(self) -> None:
        paths = sorted(CONF.rglob("*.yaml"))
        self.options = [read(path) for path in paths]
        first = ("config.yaml", "shapes.yaml", "plain.yaml", "lora.yaml", "default.yaml")
        known = sorted(self.options, key=lambda option: option.path.name not in first)
        self.listed: dict[str, str] = yaml.safe_load(KEYS.read_text())
        self.targets: dict[str, str] = {}
        self.meanings: dict[str, str] = {}
        for option in known:
            for name, target in option.targets.items():
                self.targets.setdefault(name, target)
            for key in option.keys:
                if key.comment:
                    self.meanings.setdefault(key.name, key.comment)
                    self.meanings.setdefault(self._place(key), key.comment)

    def _place(self, key: Key) -> str:
        """Name a key by its target, so that one comment serves all files with that target."""
        return f"{key.target}:{key.name.rpartition('.')[2]}"

    def target(self, key: Key, option: Option) -> Any:
        """Import what takes a key; None for a key that no target takes."""
        node, _, _ = key.name.rpartition(".")
        known = option.targets.get(node) or key.target or self.targets.get(node)
        if known is None or not known.startswith(("flowrl.", "torch.", "lightning.")):
            return None
        return import_target(node, known)

    def hint(self, key: Key, option: Option) -> Any:
        """Look up the hint of a key; None where there is none."""
        last = key.name.rpartition(".")[2]
        target = self.target(key, option)
        if target is not None:
            hints = {**hints_of(target), **foreign_of(target).hints}
            return hints.get(last)
        group: Any = Settings
        for step in key.name.split("."):
            hints = get_type_hints(group, include_extras=True) if inspect.isclass(group) else {}
            group = hints.get(step)
        return group

    def row(self, key: Key, option: Option) -> str:
        """Write a key's row of a table."""
        hint = self.hint(key, option)
        is_node = hint is None or hint is Node or not key.value
        bounds = "" if is_node else describe(hint)
        meaning = self.meaning(key)
        default = f"`{key.value}`" if key.value else ""
        return (
            f"| `{key.name}` | {cell(default)} | {cell(prose(bounds))} | {cell(prose(meaning))} |"
        )

    def meaning(self, key: Key) -> str:
        """Say what a key means, and what its file says of its value."""
        listed = self._listed(key.name)
        if listed and key.comment:
            return f"{listed}; {key.comment}"
        elsewhere = self.meanings.get(key.name) or self.meanings.get(self._place(key))
        return listed or key.comment or elsewhere or self._referred(key)

    def _listed(self, name: str) -> str:
        """Look a key up in keys.yaml."""
        fitting = [text for pattern, text in self.listed.items() if fnmatch(name, pattern)]
        return fitting[0] if fitting else ""

    def _referred(self, key: Key) -> str:
        """Say whose value a key takes, where it is a reference."""
        match = re.fullmatch(r"\"?'?\$\{([\w.]+)\}\"?'?", key.value)
        if match is None:
            return ""
        said = self.meanings.get(match[1])
        return f"as {match[1]}: {said}" if said else f"as {match[1]}"


def prose(text: str) -> str:
    """Escape what Markdown and mathematics would take for theirs, outside of `code`."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([*$<>\[\]_\\])", r"\\\1", parts[number])
    return "`".join(parts)


def cell(text: str) -> str:
    """Escape the bars of a table's cell."""
    return text.replace("|", "\\|")


def paragraphs(target: Any) -> str:
    """Return a target's docstring as Markdown, its indented formulas as they stand."""
    text = inspect.getdoc(target) or ""
    blocks = PARAGRAPHS_END.split(text)
    shown = [block if block.startswith("    ") else prose(block) for block in blocks]
    return "\n\n".join(shown)


def section(option: Option, reference: Reference) -> Iterator[str]:
    """Yield the paragraphs of one option."""
    yield f"### {option.group}={option.path.stem}" if option.group else f"## {option.path.name}"
    commands = [line for line in option.head if line.startswith(("python ", "tensorboard "))]
    told = " ".join(line for line in option.head if line not in commands)
    if told:
        yield prose(told)
    if commands:
        yield "```bash\n" + "\n".join(commands) + "\n```"
    chosen = [word for word in option.defaults if word != "_self_"]
    if option.group and chosen:
        yield "Takes " + ", ".join(f"`{word}`" for word in chosen) + "."
    if option.keys:
        rows = [reference.row(key, option) for key in option.keys]
        yield "\n".join(["| key | default | may be | meaning |", "|---|---|---|---|", *rows])
    for name, target in option.targets.items():
        if target.startswith("flowrl.") and option.path.name != "config.yaml":
            yield f"`{name}` is `{target}`:"
            told = paragraphs(import_target(name, target))
            yield "\n".join(f"> {line}".rstrip() for line in told.split("\n"))


def page() -> str:
    """Write the whole reference, group by group, from the first heading of the second level on."""
    reference = Reference()
    blocks: list[str] = []
    for name in ("config", "serve"):
        [option] = [one for one in reference.options if one.path == CONF / f"{name}.yaml"]
        blocks += section(option, reference)
    groups = {option.group: "" for option in reference.options if option.group}
    for group in dict.fromkeys([*(name for name in GROUPS if name in groups), *groups]):
        blocks += [f"## {group}", GROUPS.get(group, "")]
        for option in reference.options:
            if option.group == group:
                blocks += section(option, reference)
    return "\n\n".join(filter(None, blocks)) + "\n"


def main() -> None:
    """Print the page."""
    print(page())


if __name__ == "__main__":
    raise SystemExit(run_program(main))
