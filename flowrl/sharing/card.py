"""The model card of a run: what it was made of, what it gained, and how it is loaded."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from flowrl import DISTRIBUTION, __version__
from flowrl.runs.changes import Change
from flowrl.runs.description import (
    EMBEDDED,
    address_of,
    base_model_of,
    is_hub_id,
    method_of,
    reward_of,
)
from flowrl.runs.provenance import short
from flowrl.runs.secrets import is_secret
from flowrl.sharing.drawn import is_moving
from flowrl.sharing.loading_code import loading_code
from flowrl.sharing.privacy import clean
from flowrl.sharing.scores import Scores
from flowrl.values.sizes import in_words, known_size

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a card is written from. `config` is the published configuration, `weights` says
    what is in the folder in words, and `transformer` is the class of a whole one, empty for a LoRA.
    `companions` are the names of a LoRA's files of further networks, by network.
    `revision` is the branch that it is uploaded to, None for the main one. `num_frames` says what
    is drawn, as `flowrl.sharing.drawn` tells.
    """

    repository: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    changes: Sequence[Change]
    scores: Sequence[Scores]
    has_pictures: bool
    weights: str
    transformer: str = ""
    companions: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    num_frames: int | None = None


def card(facts: Facts) -> str:
    """Return the card as Markdown, with the head that the hub reads."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Markdown, whose own characters `cell` and `code` escape.
        autoescape=False,
    )
    environment.filters |= {"cell": cell, "code": code}
    config, summary = facts.config, facts.summary
    base = base_model_of(config)
    method = method_of(config)
    is_lora = not facts.transformer
    size = known_size(config)
    text = environment.get_template("card.md").render(
        head=yaml.safe_dump(head(facts), sort_keys=False, allow_unicode=True).strip(),
        title=facts.repository.partition("/")[2],
        kind="A LoRA" if is_lora else "The whole transformer, fine-tuned,",
        base=base,
        base_link=_base_link(base),
        method_link=_link(method.name, address_of(method)),
        formula=textwrap.fill(method.formula, 80),
        reward=code(reward_of(config)),
        is_lora=is_lora,
        is_embedded=base.startswith(EMBEDDED),
        is_local=not is_hub_id(base) and not base.startswith(EMBEDDED),
        distribution=DISTRIBUTION,
        has_pictures=facts.has_pictures,
        iterations=summary.get("iterations"),
        code=loading_code(
            config,
            facts.repository,
            facts.transformer,
            facts.revision,
            num_frames=facts.num_frames,
            companions=facts.companions,
        ),
        scores=facts.scores,
        rollouts=_rollouts(config),
        facts=_training(facts),
        changes=[_cleaned(change) for change in facts.changes],
        resolution=in_words(*size) if size else "an unknown number of",
        version=__version__,
        commit=_commit(summary),
        versions=_versions(summary),
    )
    # Blocks that say nothing leave empty lines behind.
    return _without_gaps(text)


def head(facts: Facts) -> dict[str, Any]:
    """Return the fields by which the hub files a card; the licence is left to the base model's."""
    config = facts.config
    base = base_model_of(config)
    method = method_of(config).name.lower().replace(" ", "-")
    is_lora = not facts.transformer
    fields: dict[str, Any] = {}
    # The hub looks it up, so only what lies there may be named.
    if is_hub_id(base):
        fields["base_model"] = base
        fields["base_model_relation"] = "adapter" if is_lora else "finetune"
    fields["library_name"] = "diffusers"
    is_clip = is_moving(facts.num_frames)
    fields["pipeline_tag"] = "text-to-video" if is_clip else "text-to-image"
    kinds = ["lora"] if is_lora else []
    fields["tags"] = ["flowrl", "reinforcement-learning", "flow-matching", method, *kinds]
    return fields


def cell(text: object) -> str:
    """Return a text as one cell of a Markdown table."""
    line = " ".join(str(text).split())
    for mark in ("\\", "|", "<", "`", "*", "_"):
        line = line.replace(mark, f"\\{mark}")
    return line


def code(text: object) -> str:
    """Return a text for a span of code, which cannot hold its own mark."""
    return " ".join(str(text).split()).replace("`", "'")


def _base_link(base: str) -> str:
    """Name the base model, as a link where it lies on the hub."""
    if base.startswith(EMBEDDED):
        return f"FlowRL's embedded {base.removeprefix(EMBEDDED)}"
    return _link(base, f"https://huggingface.co/{base}" if is_hub_id(base) else "")


def _link(text: str, address: str) -> str:
    return f"[{text}]({address})" if address else text


def _rollouts(config: Mapping[str, Any]) -> str:
    """Describe how images were drawn in training."""
    rollout = config.get("rollout") or {}
    sampler = config.get("sampler") or {}
    kind = str(sampler.get("_target_", "unknown")).rpartition(".")[2]
    options = [f"{key} {value}" for key, value in sampler.items() if key != "_target_"]
    named = f"{kind} ({', '.join(options)})" if options else kind
    return (
        f"{rollout.get('num_steps', '?')} steps of {named}, guidance "
        f"{rollout.get('guidance_scale', '?')}"
    )


def _training(facts: Facts) -> list[tuple[str, str]]:
    """List the budget and the settings of a run, those that are known."""
    config, summary = facts.config, facts.summary
    prompts = _at(config, "batch", "prompts_per_iteration")
    group = _at(config, "batch", "group_size")
    optimizer = str(_at(config, "optimizer", "_target_")).rpartition(".")[2]
    rows = [
        ("prompts", _prompts(config)),
        ("iterations", f"{summary.get('iterations')} of {config.get('num_iterations')}"),
        ("images an iteration", f"{prompts} prompts x {group}"),
        ("images drawn in training", summary.get("images")),
        ("weights", facts.weights),
        ("base in training and pictures, held in", (config.get("model") or {}).get("quantization")),
        ("optimizer", f"{optimizer}, learning rate {_at(config, 'optimizer', 'lr')}"),
        ("seed", config.get("seed")),
        ("time", _time(summary.get("seconds"))),
        ("device", summary.get("device")),
        ("peak memory", _memory(summary.get("peak_memory_gib"))),
    ]
    return [(key, str(value)) for key, value in rows if value is not None]


def _prompts(config: Mapping[str, Any]) -> str:
    """Describe the prompts by the function that reads or makes them and its arguments."""
    node = _at(config, "data", "prompts")
    if not isinstance(node, Mapping):
        return "unknown"
    name = str(node.get("_target_", "unknown")).rpartition(".")[2]
    known = {key: value for key, value in node.items() if key != "_target_" and value is not None}
    return f"{name}({', '.join(f'{key}={value}' for key, value in known.items())})"


def _time(seconds: Any) -> str | None:
    if not isinstance(seconds, int | float):
        return None
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def _memory(gib: Any) -> str | None:
    return f"{gib:.3g} GiB" if isinstance(gib, int | float) else None


def _commit(summary: Mapping[str, Any]) -> str:
    revision = summary.get("git_revision")
    return short(revision) if revision else ""


def _versions(summary: Mapping[str, Any]) -> str:
    versions = summary.get("versions") or {}
    words = [
        f"{name} {versions[name]}" for name in ("torch", "diffusers", "peft") if name in versions
    ]
    return ", ".join(words) or "versions unknown"


def _cleaned(change: Change) -> Change:
    if is_secret(change.key):
        return Change(change.key, "a secret", "another", change.iteration)
    return Change(change.key, clean(change.before), clean(change.after), change.iteration)


def _at(config: Mapping[str, Any], group: str, key: str) -> Any:
    """Return a value of a group, None where there is none."""
    node = config.get(group)
    return node.get(key) if isinstance(node, Mapping) else None


def _without_gaps(text: str) -> str:
    """Return a text with one empty line wherever several stand."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"
