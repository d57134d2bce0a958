"""The subjects of an evaluation: a base model, a run, or a file or folder with a LoRA or a whole
transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flowrl.errors import UserError
from flowrl.models.outline import outline
from flowrl.runs.files import CONFIG, file_digest
from flowrl.training.policy import Policy
from flowrl.tuning import formats, full
from flowrl.tuning.layer_names import NAMES

EXPORTS = (formats.FOLDER, formats.WHOLE_FOLDER)
"""The folders, below a run's, of what it exported."""


@dataclass(frozen=True)
class Subject:
    """A label, and the file or folder of its weights (None for a base model), which may be a whole
    run's folder.
    """

    label: str
    path: Path | None

    @classmethod
    def read(cls, text: str) -> Subject:
        """Read a subject from `base`, a file or a folder, or any of them with a name before it:
        NAME=PATH.

        Raises UserError where there is no such path.
        """
        name, _, place = text.rpartition("=")
        if place == "base":
            return cls(name or "base", None)
        path = Path(place).expanduser().resolve()
        if not path.exists():
            raise UserError(
                f"{place}: no such file or folder; give `base`, a LoRA file, a run's folder or a "
                "folder with weights"
            )
        return cls(name or _label(path), path)

    @property
    def is_run(self) -> bool:
        """True for the folder of a run, which holds a configuration."""
        return self.path is not None and (self.path / CONFIG).is_file()

    def weights(self) -> list[Path]:
        """Return the files that decide what is evaluated; none for a base model. Raises UserError
        for a folder without.
        """
        return self._weights

    @cached_property
    def _weights(self) -> list[Path]:
        # Looked for once: of a run that still trains, the newest checkpoint may be another one by
        # then.
        if self.path is None:
            return []
        for folder in (self.path / formats.WHOLE_FOLDER, self.path):
            if whole := formats.whole_files(folder):
                return whole
        return formats.files_of(self.path)

    @property
    def is_full(self) -> bool:
        """True where its files hold the whole transformer, as full fine-tuning exports or averages
        it.
        """
        files = self.weights()
        if files and files[0].name == formats.AVERAGE:
            # A checkpoint's average has one name for both kinds: its tensors tell them apart.
            return not any(".lora_" in key for key in _keys(files[0]))
        return any(path.name.startswith(formats.WHOLE) for path in files)

    def examine(self, model: Mapping[str, Any]) -> str | None:
        """Read its weights and compare them with the base model's architecture, before anything is
        loaded or drawn.

        Returns what was read in words, None for a base model. Raises UserError for weights that are
        missing, damaged, of another kind or of another architecture; where the architecture is not
        known without the weights, that is left to their loading.
        """
        if self.path is None:
            return None
        transformer = outline(model)
        if self.is_full:
            if transformer is not None:
                full.check_whole(transformer, self.weights())
            return "a whole transformer"
        weights = formats.read(self.weights()[0])
        if transformer is not None:
            formats.check(weights, transformer, self.path)
        return weights.describe()

    def load_into(self, policy: Policy) -> None:
        """Put a whole transformer in place of the policy's; a LoRA is there already, as what its
        policy began from.
        """
        if self.is_full:
            full.load_files(policy.transformer, self.weights())

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Collect what decides its samples and scores: digests of weights under `weights` (None for
        a base model), and the nodes `model`, `reward` and `evaluation` of the configuration.
        """
        digests = [file_digest(path) for path in self.weights()]
        return {
            "weights": " ".join(digests) or None,
            "model": config["model"],
            "reward": config["reward"],
            "evaluation": config["evaluation"],
        }


def _label(path: Path) -> str:
    """Name a subject by its path: a file's own name, where it is not what every exported file is
    called, or its folder's.
    """
    if path.is_file():
        if path.name not in NAMES.values():
            return path.stem
        path = path.parent
    # Folders that every run has say nothing, nor does a job's number: outputs/sweep/3 and
    # outputs/sweep/3/lora are sweep-3.
    names = [name for name in path.parts if name not in (*EXPORTS, "outputs", "/")]
    length = 2 if path.name in EXPORTS or path.name.isdigit() else 1
    return "-".join(names[-length:])


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise UserError(
            f"{file} is damaged ({error}); delete its checkpoint to take the one before"
        ) from error
