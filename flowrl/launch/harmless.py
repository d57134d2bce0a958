"""The keys that do not decide a run's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

HARMLESS = {
    "resume": "which run this is",
    "run_dir": "where it writes",
    "name": "a label",
    "tags": "labels",
    "condition": "a label",
    "sweep": "a label",
    "choices": "labels: what they set is compared",
    "logger": "where figures go",
    "callbacks": "what is shown",
    "viewing": "when pictures are drawn and alarms given",
    "checkpoint": "how often it is saved",
    "objective": "what a search reads at the end",
    "trainer": "where it runs: the batch plan keeps one trajectory on any number of processes",
    "num_threads": "how fast it runs",
    "batch.max_micro_batch": "how much memory it takes",
    "batch.num_processes": "follows the trainer",
    "backend.gradient_checkpointing": "how much memory it takes",
    "embeddings": "where prompt embeddings are kept",
    "max_missing": "when it stops",
    "gate_tolerance": "when it stops",
    "scorer_timeout": "when it stops waiting",
    "rehearsal": "what is tried before it starts",
    "trust_folder": "what may be built at all",
    "evaluation.batch_size": "how much memory it takes: every image has noise of its own",
}
"""Keys that do not decide a run's numbers, with the reason; a change of any other is told."""

HARMLESS_OF_REWARDS = {
    "client": "how a scoring server is asked",
    "url": "where a scoring server is",
    "wait_seconds": "how long people's votes are waited for",
}
"""The same of keys and nodes anywhere below `reward`."""


def is_harmless(key: str) -> bool:
    """Tell whether `key`, or a node that it lies in, is one of `HARMLESS` or, of a reward, of
    `HARMLESS_OF_REWARDS`.
    """
    group, *names = key.split(".")
    if group == "reward" and not HARMLESS_OF_REWARDS.keys().isdisjoint(names):
        return True
    return any(lies_in(key, name) for name in HARMLESS)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk (dotted key, value) of every leaf of a plain container that is no interpolation; entries
    of lists are leaves.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            yield from leaves(value, name)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from leaves(value, f"{prefix}.{i}")
    elif not (isinstance(node, str) and "${" in node):
        yield prefix, node


def lies_in(key: str, node: str) -> bool:
    """Tell whether `key` is `node` or stands below it."""
    return key == node or key.startswith(f"{node}.")
