"""The folder that is published of a run: weights in diffusers' layout, model card, pictures and
configuration.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowrl.errors import UserError
from flowrl.report.runs import Run, read
from flowrl.runs.base_model import KEY, is_recorded_folder, named_in_run
from flowrl.runs.command_line import resume_command
from flowrl.runs.description import base_model_of, is_hub_id
from flowrl.runs.files import CONFIG, grant_usual_mode, read_json, read_yaml
from flowrl.sharing import privacy, scores
from flowrl.sharing.card import Facts, card
from flowrl.sharing.drawn import num_frames_of
from flowrl.sharing.scores import Scores
from flowrl.tuning import formats
from flowrl.tuning.layer_names import NAMES
from flowrl.tuning.metadata import notes_of
from flowrl.tuning.networks import companions_of
from flowrl.tuning.writer import write

CARD = "README.md"
PICTURE = "images/before_and_after.png"
TEXTS = (".md", ".yaml", ".json", ".safetensors")
REMEDY = "restore it, or push another run"


@dataclass(frozen=True, slots=True)
class Shared:
    """A run that may be shared: what it says of itself, the files of its weights, the scores of the
    card, and what its sharer should know.
    """

    run: Run
    config: Mapping[str, Any]
    folder: Path
    weights: list[Path]
    scores: list[Scores]
    notes: Sequence[str] = ()

    @property
    def is_whole(self) -> bool:
        """True where the weights are a whole transformer, and no LoRA."""
        return self.weights[0].name.startswith(formats.WHOLE)


def examine(folder: Path, evaluation: Path | None) -> Shared:
    """Read a run and see that it may be shared. Raises UserError, with the remedy, for one that is
    none, has not finished, learned nothing, or has damaged weights.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a finished run")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} there; give the folder of a finished run")
    run = read(folder, folder.name)
    if run.status != "finished":
        raise UserError(
            f"{folder}: its status is {run.status!r}, and only a finished run is shared; "
            f"continue it with: {resume_command(folder)}"
        )
    weights = _weights(folder)
    written = read_yaml(folder / CONFIG, REMEDY)
    config = named_in_run(written, folder)
    if evaluation is None:
        found = scores.from_summary(run.summary, config)
    else:
        found = scores.from_evaluation(evaluation, weights, folder)
    return Shared(run, config, folder, weights, found, _notes(written, config, folder))


def _notes(written: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> list[str]:
    """Say where the base model of a run is a guess: how it is written, and is read in `config`."""
    text = str((written.get("model") or {}).get("pretrained"))
    if not is_hub_id(text) or is_recorded_folder(written, folder) is not None:
        return []
    kind = "the hub's" if is_hub_id(base_model_of(config)) else "a folder"
    return [
        f"this run does not record whether {KEY}={text} was a folder; the card takes it for {kind}"
    ]


def _weights(folder: Path) -> list[Path]:
    """Return the files that a run exported. Raises UserError where there are none, or where a LoRA
    adds nothing.
    """
    if whole := formats.whole_files(folder / formats.WHOLE_FOLDER):
        return whole
    if not (folder / formats.FOLDER).is_dir():
        raise UserError(
            f"{folder}: neither {formats.FOLDER}/ nor {formats.WHOLE_FOLDER}/ there, so it has no "
            "weights to share"
        )
    files = formats.files_of(folder / formats.FOLDER)
    lora_file = formats.read(files[0])
    if not any(matrix.any() for matrix in lora_file.b.values()):
        raise UserError(
            f"{files[0]}: all of its B are zero, so it adds nothing to the base model: nothing was "
            "learned that could be shared"
        )
    return files


def write_folder(
    shared: Shared, out: Path, repository: str, revision: str | None = None
) -> list[Path]:
    """Write the folder of a run for a repository, or for its branch `revision`, whole or not at
    all, and list its files.

    Raises UserError for a folder that holds something else, and where a file would tell a place on
    this machine.
    """
    out = out.expanduser().absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out}: is no folder; give a new one")
    if out.is_dir() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise UserError(f"--out {out}: holds something else; give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _fill(shared, partial, repository, revision)
        files = _files(partial)
        names = {path.relative_to(partial) for path in files}
        # What stands there is replaced, so it must be an earlier version and nothing besides.
        strangers = [path for path in _files(out) if path.relative_to(out) not in names]
        if strangers:
            raise UserError(
                f"--out {out}: holds something else, such as {strangers[0].relative_to(out)}; give "
                "a new folder"
            )
        texts = [path for path in files if path.suffix in TEXTS]
        privacy.refuse_places(texts, (Path.home(), Path.cwd(), shared.folder.resolve()))
        grant_usual_mode(partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [out / path.relative_to(partial) for path in files]


def _files(folder: Path) -> list[Path]:
    """List all files below a folder, in order; none where there is no folder."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _fill(shared: Shared, folder: Path, repository: str, revision: str | None) -> None:
    """Write all files of the folder."""
    config = privacy.published(shared.config)
    if shared.is_whole:
        weights, transformer = _copy_whole(shared, folder / formats.WHOLE_FOLDER)
    else:
        weights, transformer = _write_lora(shared, folder), ""
    lora = companions_of(folder / NAMES["diffusers"])
    pictures = [path for path in shared.run.images if not path.is_symlink()]
    if pictures:
        (folder / PICTURE).parent.mkdir()
        shutil.copyfile(pictures[-1], folder / PICTURE)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    facts = Facts(
        repository=repository,
        config=config,
        summary=shared.run.summary,
        changes=shared.run.changes,
        scores=shared.scores,
        has_pictures=bool(pictures),
        weights=weights,
        transformer=transformer,
        companions={network: place.name for network, place in lora.items()},
        revision=revision,
        num_frames=num_frames_of(shared.config, shared.folder),
    )
    (folder / CARD).write_text(card(facts), encoding="utf-8")


def _write_lora(shared: Shared, folder: Path) -> str:
    """Write the LoRA anew, with the metadata that the reader takes and nothing else, and describe
    it.
    """
    lora_file = formats.read(shared.weights[0])
    notes = {**notes_of(shared.config), **lora_file.notes}
    write(dataclasses.replace(lora_file, notes=notes), folder, "diffusers")
    return f"LoRA: {lora_file.describe()}"


def _copy_whole(shared: Shared, target: Path) -> tuple[str, str]:
    """Copy a whole transformer, its configuration without the place of its base; return it in words
    and its class.
    """
    source = shared.weights[0].parent
    target.mkdir()
    for path in sorted(source.iterdir()):
        if not (path.name == "config.json" or path.name.startswith(formats.WHOLE)):
            continue  # nothing that an export writes
        if path.is_symlink():
            raise UserError(f"{path} is a link, and only a run's own files are published")
        if path.suffix != ".json":
            shutil.copyfile(path, target / path.name)
            continue
        content = read_json(path, REMEDY)
        if "_name_or_path" in content:
            content["_name_or_path"] = privacy.clean(content["_name_or_path"])
        (target / path.name).write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")
    kind = str(read_json(target / "config.json", REMEDY).get("_class_name", "AutoModel"))
    return f"the whole {kind}", kind
