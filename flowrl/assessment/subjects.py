"""What is evaluated: a base model, a run, or a folder with a LoRA or a whole transformer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.models import lora
from flowrl.modules.policy import Policy
from flowrl.runs import checkpoint
from flowrl.runs.files import CONFIG

EXPORTS = (lora.FOLDER, lora.WHOLE_FOLDER)
"""Where a run's folder holds what it exported."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A label, a folder (None for a base model), and whether that is a whole run's."""

    label: str
    folder: Path | None

    @classmethod
    def read(cls, text: str) -> Subject:
        """From `base`, a folder, or either with a name before it: NAME=FOLDER. Raises ValueError without the folder."""
        name, _, place = text.rpartition("=")
        if place == "base":
            return cls(name or "base", None)
        folder = Path(place).expanduser().resolve()
        if not folder.is_dir():
            raise UserError(f"{place}: no such folder; give `base`, a run's folder or a folder with its weights")
        parts = [part for part in folder.parts if part not in (*EXPORTS, "outputs", "/")]
        return cls(name or "-".join(parts[-2:] if folder.name in EXPORTS else parts[-1:]), folder)

    @property
    def is_run(self) -> bool:
        """Whether its folder is a run's, with a configuration."""
        return self.folder is not None and (self.folder / CONFIG).is_file()

    def weights(self) -> list[Path]:
        """The files that decide what is evaluated; none for a base model. Raises ValueError for a folder without."""
        if self.folder is None:
            return []
        for folder in (*(self.folder / name for name in EXPORTS), self.folder):
            if files := lora.whole_files(folder) or sorted(folder.glob("*.safetensors"))[:1]:
                return files
        complete = checkpoint.list_complete(self.folder / "checkpoints")
        if not complete:
            raise UserError(f"{self.folder}: neither a LoRA nor a checkpoint there")
        return [complete[-1] / "ema.safetensors"]

    @property
    def is_full(self) -> bool:
        """Whether its files hold the whole transformer, as full fine-tuning exports it."""
        return any(path.name.startswith(lora.WHOLE) for path in self.weights())

    def load_into(self, policy: Policy) -> None:
        """Put this subject's weights into the policy's adapter, or in place of all of the transformer's."""
        files = self.weights()
        if not files:
            return
        if self.is_full or files[0].name == "ema.safetensors":
            lora.load_files(policy.transformer, files)
        else:
            lora.load_folder(policy.transformer, files[0].parent)

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What decides its samples and scores: the digests of its weights, and parts of the resolved configuration."""
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.weights()]
        keys = ("model", "reward", "evaluation")
        return {"weights": " ".join(digests) or None} | {key: config[key] for key in keys}
