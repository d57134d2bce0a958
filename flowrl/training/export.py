"""The export of what was learned: the averaged weights, as stock pipelines load them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from flowrl.models.weights import require_finite
from flowrl.parallel.sharding import is_divided
from flowrl.runs.files import grant_usual_mode
from flowrl.training.policy import Policy
from flowrl.tuning.layer_names import NAMES
from flowrl.tuning.metadata import stamp
from flowrl.tuning.networks import companions_of
from flowrl.tuning.weights import swapped


def export_average(
    policy: Policy, folder: Path, notes: Mapping[str, str], *, is_writer: bool = True
) -> Path:
    """Write the EMA's weights below `folder`, under the tuning's name, whole or not at all; return
    where. A LoRA's file carries `notes` (see `flowrl.tuning.metadata`).

    All processes call it, of which one is the writer: divided weights are gathered. Raises
    NotFinite where a weight is no number.
    """
    require_finite(policy.weights())
    target = folder / policy.tuning.folder_name
    partial = target.with_suffix(".partial")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
    # Gathering divided weights takes all processes, of which the first alone writes.
    if is_writer or is_divided(policy.transformer):
        with swapped(policy.tuning.parameters(), policy.ema.weights):
            policy.tuning.save(policy.model.pipeline, partial)
    if is_writer:
        if (lora := partial / NAMES["diffusers"]).is_file():
            for file in (lora, *companions_of(lora).values()):
                stamp(file, notes)
        grant_usual_mode(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    return target
