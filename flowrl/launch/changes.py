"""The changes that a resumed run brings: keys that decide its numbers, the code, and inputs that
are no longer the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.launch.harmless import is_harmless, leaves, lies_in
from flowrl.parallel.strategies import is_later_rank
from flowrl.runs import provenance
from flowrl.runs.changes import Change, read_changes, with_changes
from flowrl.runs.command_line import key_of
from flowrl.runs.files import PROVENANCE, SUMMARY, TEACHERS, read_object, write_whole
from flowrl.tuning.formats import START
from flowrl.types import Prompt
from flowrl.values.plural import counted

_PROMPTS = ("data.prompts", "evaluation.sets")
_REFERENCE = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_Json = dict[str, Any]


def overridden(before: Any, cfg: DictConfig) -> list[Change]:
    """List what a configuration has otherwise than the plain container `before`, harmless keys left
    out.
    """
    old = dict(leaves(before))
    changes = []
    for key, value in leaves(OmegaConf.to_container(cfg)):
        # None is a value like any other, so a key that was not there is told by its absence.
        is_same = key in old and old[key] == value
        if is_same or is_harmless(key):
            continue
        earlier = _text(old[key]) if key in old else "none"
        changes.append(Change(key, earlier, _text(value)))
    return changes


def refuse_without_iterations(
    folder: Path, changes: Sequence[Change], iteration: int, num_iterations: int
) -> None:
    """Raise UserError where a run has done its iterations, or more than it shall do, and its record
    would say what no iteration was done with.

    A run may be ended where it stands by lowering `num_iterations` to the iterations done.
    """
    if iteration > num_iterations:
        raise UserError(
            f"num_iterations={num_iterations}: the run has finished {iteration} already"
        )
    unused = [change for change in changes if change.key != "num_iterations"]
    if unused and iteration == num_iterations:
        overrides = ", ".join(f"{change.key}={change.after}" for change in unused)
        raise UserError(
            f"{folder} is finished after {counted(iteration, 'iteration')}; raise num_iterations "
            f"to go on, or leave out {overrides}, which would change nothing but its record"
        )


def _text(value: Any) -> str:
    """Return a value as the command line has it, near enough: null, true, 0.5."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _consequence(key: str, iteration: int) -> str:
    """Say what the change of a key after `iteration` does to the run's numbers."""
    if not iteration:
        return "no iteration is done yet, so the run has the new value throughout"
    if key == "num_iterations":
        return (
            "schedules over the run, such as learning_rate=cosine, now follow the new length, so "
            "the numbers differ from those of a run never stopped"
        )
    return "from here on the numbers are not those of a run with either value throughout"


class Provenance:
    """The inputs and the code of the run in `folder`, compared on resumption with those that it
    began with.

    An input is a set of prompts, or a file, folder or hub repository that a key names. One that
    changed is refused unless the run's `overrides` name its key with `++`; where the key has
    another value, it was changed on purpose. The LoRAs that a run began from and learns from are no
    inputs any more once the run has its copies.
    """

    def __init__(self, cfg: DictConfig, folder: Path, overrides: Sequence[str]) -> None:
        self.cfg = cfg
        self.path = folder / PROVENANCE
        # By its keys, what the run has copies of.
        self.kept = {f"teachers.{copy.name}.lora" for copy in (folder / TEACHERS).glob("*")}
        if (folder / START).is_dir():
            self.kept.add("lora.start")
        self.told: set[str] = set()
        self.changes: list[_Json] = []
        self.accepted = [key_of(item) for item in overrides if item.startswith("++")]
        # A run of an earlier version has told its code in its summary.
        files = [path for path in (self.path, folder / SUMMARY) if path.is_file()]
        self.before: _Json = {}
        if files:
            self.before = read_object(files[0], "delete it to go on without comparing")
        self.inputs: _Json = {}

    def tell_changes(self, changes: Sequence[Change], iteration: int) -> None:
        """Say in one line each which keys are changed after `iteration`, and with which other code
        and packages the run goes on; the keys are kept.
        """
        for change in changes:
            print(f"{change}: {_consequence(change.key, iteration)}")
        earlier = read_changes(self.before, self.path)
        self.changes = with_changes(earlier, changes, iteration)
        if not self.before:
            return
        texts = provenance.changes(self.before, provenance.environment())
        if texts:
            differences = ", ".join(texts)
            print(
                f"{differences}: the run goes on with other code, so its numbers may differ "
                "from here on"
            )

    def check_paths(self) -> None:
        """Compare what keys name by path. Raises UserError for what has changed."""
        plain = OmegaConf.to_container(self.cfg)
        values = dict(leaves(plain))
        # Prompts are compared as they are read, wherever they stand.
        below_prompts = tuple(f"{name}." for name in _PROMPTS)
        for key, value in values.items():
            if is_harmless(key) or key.startswith(below_prompts):
                continue
            if key in self.kept:
                continue
            # A hub repository's revision stands beside its name.
            node = key.rpartition(".")[0]
            revision = values.get(f"{node}.revision")
            digest = provenance.path_digest(key, value, revision)
            if digest:
                self._check(key, value, digest, f"{key}={value}")
                # Elsewhere a folder's path may look like a hub id.
                self.inputs[key]["kind"] = provenance.path_kind(value)

    def check_prompts(self, train: Sequence[Prompt], sets: Mapping[str, Sequence[Prompt]]) -> None:
        """Compare the prompts to train on and those of each evaluation set. Raises UserError for
        what has changed.
        """
        cfg = self.cfg
        self._check_set("data.prompts", train, cfg.data.prompts, {})
        # With other limits an evaluation takes other prompts of the same source, on purpose.
        subset = {
            "max_prompts": cfg.evaluation.max_prompts,
            "subset": cfg.evaluation.get("subset", "first"),
        }
        for name, prompts in sets.items():
            node = cfg.evaluation.sets[name]
            self._check_set(f"evaluation.sets.{name}", prompts, node, subset)

    def _check_set(self, key: str, chosen: Sequence[Prompt], node: Any, options: _Json) -> None:
        """Compare the prompts that were `chosen` of the source at `key`, whose configuration is
        `node`, by `options`.
        """
        value = node
        if OmegaConf.is_config(node):
            value = OmegaConf.to_container(node, resolve=True)
        path = ""
        if isinstance(value, dict) and "path" in value:
            path = f" ({value['path']})"
        label = f"{key}{path}: its {counted(len(chosen), 'prompt')}"
        digest = provenance.prompts_digest(chosen)
        self._check(key, {"node": value, **options}, digest, label)

    def write(self) -> None:
        """Keep what this run is made of, for its next resumption."""
        content = provenance.environment() | {
            "digests": provenance.DIGESTS,
            "inputs": self.inputs,
            "changes": self.changes,
        }
        write_whole(self.path, json.dumps(content, indent=2) + "\n")

    def _check(self, key: str, value: Any, digest: str, label: str) -> None:
        """Note an input, and refuse it where its content changed under the same key and value.

        `label` names it to the user.
        """
        self.inputs[key] = {"value": value, "digest": digest}
        inputs = self.before.get("inputs")
        before = inputs.get(key) if isinstance(inputs, dict) else None
        # An input that is new, or was changed on purpose.
        if not isinstance(before, dict) or before.get("value") != value:
            return
        if before.get("digest") == digest:
            return
        # Of an earlier version, whose digests are others, except those of prompts.
        if not key.startswith(_PROMPTS) and self.before.get("digests") != provenance.DIGESTS:
            return
        accepted = self._accepted_by(key)
        if accepted is None:
            name, shown = _remedy(key, value)
            raise UserError(
                f"{label} changed since the run began, so it would go on with other numbers; put "
                f"back what was there, or take it as it is: ++{name}={shown}"
            )
        # Paths are compared twice, before and after loading, and told once.
        if key not in self.told and not is_later_rank():
            self.told.add(key)
            print(f"{label} changed since the run began; taken as it is, as ++{accepted} says")

    def _accepted_by(self, key: str) -> str | None:
        """Return the accepted key that stands for `key`: itself or a node that it lies in; None
        where there is none.

        Prompts are accepted by any of their options too, and by those that their values refer to,
        as those of an evaluation set may be the ones to train on.
        """
        names = {key}
        if key.startswith(_PROMPTS):
            names |= _options(OmegaConf.to_container(self.cfg), key)
        for accepted in self.accepted:
            if any(lies_in(name, accepted) for name in names):
                return accepted
        return None


def _options(config: Any, key: str) -> set[str]:
    """Return the keys below a set of prompts, and those of other sets that their interpolations
    lead to.
    """
    options: set[str] = set()
    todo = [key]
    while todo:
        name = todo.pop()
        # Sets may refer to one another; what is no prompts' key is accepted by its own name alone.
        if name in options or not name.startswith(_PROMPTS):
            continue
        options.add(name)
        node = config
        for word in name.split("."):
            node = node.get(word) if isinstance(node, dict) else None
        if isinstance(node, dict):
            todo += [f"{name}.{word}" for word in node]
        elif isinstance(node, str):
            todo += _REFERENCE.findall(node)
    return options


def _remedy(key: str, value: Any) -> tuple[str, Any]:
    """Return a key and its value to name with `++`: a path's own, or of a set of prompts its path
    or its first option.
    """
    if not isinstance(value, dict):
        return key, value
    node = value["node"] if isinstance(value["node"], dict) else {}
    options = [name for name in node if name != "_target_"]
    if not options:
        return key, "VALUE"
    name = "path" if "path" in options else options[0]
    return f"{key}.{name}", node[name]
