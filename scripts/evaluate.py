"""Evaluate base models, runs and LoRA folders side by side, into one page.

    python scripts/evaluate.py base outputs/latest                        # before and after, on the run's own sets
    python scripts/evaluate.py base outputs/a outputs/b/lora --out outputs/compared
    python scripts/evaluate.py base outputs/latest --prompts prompts.txt reward=clip_score

A subject is `base` (the configured base model), the folder of a run (its model, its exported LoRA or else its newest
checkpoint's average), or a folder with LoRA weights for the configured base model; `NAME=SUBJECT` gives it a name.
Words with `=` after the subjects are overrides of train.py. Where they choose no reward, model or evaluation, those of
the first run are taken. All subjects draw the same prompts from the same noise, each on the sigma grid that its run was
trained with. An evaluation that was stopped goes on with the same command.

Below --out: SUBJECT/SET/images/*.png and samples.jsonl, results.json, and page.html, one file without links.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowrl import checkpoint
from flowrl.assessment import Assessment, folder_features
from flowrl.command import CONFIG, one_line_errors, register_resolvers
from flowrl.distances import Inception, RandomConv, frechet, kernel
from flowrl.evaluation import Evaluator
from flowrl.launch import SOURCE, build, quieten
from flowrl.models import lora
from flowrl.modules.policy import Policy
from flowrl.page import page

CONF = Path(__file__).parents[1] / "conf"
FULL = "diffusion_pytorch_model"
"""How the files of a whole transformer begin."""
TRAINED = ("model", "lora", "grid", "tuning")
"""Of the configuration: what a run's weights belong to."""
OWN = (*TRAINED, "schedule", "backend", "embeddings")
"""What each run is drawn with; overrides of the last three reach all subjects."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is evaluated: its label, its folder (None for a base model), and whether that is a whole run's."""

    label: str
    folder: Path | None

    @property
    def is_run(self) -> bool:
        return self.folder is not None and (self.folder / CONFIG).is_file()

    @classmethod
    def read(cls, text: str) -> Subject:
        name, _, place = text.rpartition("=")
        if place == "base":
            return cls(name or "base", None)
        folder = Path(place).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"{place}: no such folder; give `base`, a run's folder or a folder with LoRA weights")
        parts = [part for part in folder.parts if part not in ("lora", "outputs", "/")]
        return cls(name or "-".join(parts[-2:] if folder.name == "lora" else parts[-1:]), folder)

    def weights(self) -> list[Path]:
        """The files that decide what is evaluated; none for a base model."""
        if self.folder is None:
            return []
        for folder in (self.folder / "lora", self.folder):
            if files := sorted(folder.glob(f"{FULL}*.safetensors")) or sorted(folder.glob("*.safetensors"))[:1]:
                return files
        complete = checkpoint.list_complete(self.folder / "checkpoints")
        if not complete:
            raise ValueError(f"{self.folder}: neither a LoRA nor a checkpoint there")
        return [complete[-1] / "ema.safetensors"]

    @property
    def is_full(self) -> bool:
        """Whether its files hold the whole transformer, as full fine-tuning exports it."""
        return any(path.name.startswith(FULL) for path in self.weights())

    def load_into(self, policy: Policy) -> None:
        """Put this subject's weights into the policy's adapter, or in place of all of the transformer's."""
        files = self.weights()
        if not files:
            return
        if self.is_full or files[0].name == "ema.safetensors":
            lora.load_files(policy.transformer, files)
        else:
            lora.load_folder(policy.transformer, files[0].parent)


def configure(subjects: Sequence[Subject], overrides: Sequence[str], prompts: str | None) -> DictConfig:
    """The common configuration: the overrides', or the first run's where they leave it open."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["name=evaluation", "logger=none", *overrides])
    first = next((subject for subject in subjects if subject.is_run), None)
    OmegaConf.set_struct(cfg, False)
    if first is not None:
        chosen = groups(overrides)
        kept = [key for key in ("reward", "evaluation", "data") if key not in chosen]
        # Another base model comes with its own grid, layers and backend.
        kept += [key for key in OWN if key not in chosen] if "model" not in chosen else []
        cfg = taken(cfg, run_config(first), kept, overrides)
    if prompts is not None:
        cfg.evaluation.sets = {Path(prompts).stem: {"_target_": "flowrl.prompts.text.text_prompts", "path": prompts}}
    return cfg


def groups(overrides: Sequence[str]) -> set[str]:
    """The groups that overrides choose, and what comes with them."""
    chosen = {item.split("=")[0] for item in overrides}
    return chosen | ({"embeddings"} if "backend" in chosen else set())


def taken(cfg: DictConfig, saved: DictConfig, keys: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """The configuration with a run's own `keys`, and the values below them that overrides give."""
    keys = [key for key in keys if key in saved]
    for key in keys:
        cfg[key] = saved[key]
    if "evaluation" in keys:
        # What it takes from other parts of the run, such as rollout.guidance_scale; its grid stays each subject's.
        for key in [key for key in saved.evaluation if OmegaConf.is_interpolation(saved.evaluation, key)]:
            if key != "schedule":
                cfg.evaluation[key] = saved.evaluation[key]
    values = [item.lstrip("+") for item in overrides]
    values = [item for item in values if item.split("=")[0].partition(".")[0] in keys and "." in item.split("=")[0]]
    merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist(values))
    assert isinstance(merged, DictConfig)
    return merged


def run_config(subject: Subject) -> DictConfig:
    assert subject.folder is not None
    source = subject.folder / SOURCE
    saved = OmegaConf.load(source if source.is_file() else subject.folder / CONFIG)
    assert isinstance(saved, DictConfig)
    return saved


def own_config(subject: Subject, common: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The common configuration on the subject's own model and sigma grid, without training prompts."""
    cfg = common.copy()
    if subject.is_run:
        keys = [key for key in OWN if key in TRAINED or key not in groups(overrides)]
        cfg = taken(cfg, run_config(subject), keys, overrides)
    else:
        cfg.tuning = {"_target_": "flowrl.models.full.Full"} if subject.is_full else "${lora}"
    # Resolved first: its prompts may be said to be the training prompts.
    cfg.evaluation = OmegaConf.to_container(cfg.evaluation, resolve=True)
    cfg.data.prompts = []  # nothing is trained, so no training prompt needs to be encoded
    return cfg


def settings(subject: Subject, cfg: DictConfig) -> dict[str, Any]:
    """What decides the subject's samples and scores."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in subject.weights()]
    digest = " ".join(digests) or None
    keys = ("model", "reward", "evaluation")
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {"weights": digest} | {key: plain[key] for key in keys}


@contextmanager
def loaded(subject: Subject, cfg: DictConfig) -> Iterator[Policy]:
    """The policy of a subject, on the GPU where there is one."""
    policy, _, _ = build(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    for frozen in (policy.model, policy.embed, policy.reward):
        frozen.to(device)
    subject.load_into(policy)
    yield policy


def distances(ours: torch.Tensor, theirs: torch.Tensor, features: Any, against: str, is_paired: bool) -> dict[str, Any]:
    return {
        "frechet": frechet(ours, theirs),
        "kernel": kernel(ours, theirs, is_paired=is_paired),
        "features": features.name,
        "is_published": isinstance(features, Inception),
        "against": against,
    }


def summarise(
    assessments: dict[str, Assessment], features: Any, reference: torch.Tensor | None, folder: str | None
) -> dict[str, Any]:
    """Set by set, the summary of each subject; distances only of sets with two images or more."""
    labels = list(assessments)
    base = assessments[labels[0]]
    results: dict[str, Any] = {}
    for name in base.evaluator.sets:
        found = {label: each.summary(name, base if label != labels[0] else None) for label, each in assessments.items()}
        results[name] = found
        if len(base.rows(name)) < 2:
            continue
        is_paired = reference is None
        ours = {label: each.features(name, features) for label, each in assessments.items()}
        theirs, against = (ours[labels[0]], f"the images of {labels[0]}") if reference is None else (reference, folder)
        for label in labels[1 if is_paired else 0 :]:
            found[label]["distances"] = distances(ours[label], theirs, features, str(against), is_paired)
    return results


def gallery(assessments: dict[str, Assessment], evaluator: Evaluator, name: str, count: int) -> list[Any]:
    """The first image of some prompts of the set, drawn by lot, of every subject."""
    stride = evaluator.images_per_prompt
    records = {label: each.samples(name)[::stride] for label, each in assessments.items()}
    total = len(next(iter(records.values())))
    chosen = sorted(random.Random(0).sample(range(total), min(count, total)))
    rows = []
    for i in chosen:
        first = next(iter(records.values()))[i]
        images = []
        for label, own in records.items():
            score = own[i]["parts"].get(evaluator.headline, own[i]["reward"])
            images.append((label, assessments[label].folder / name / own[i]["file"], score))
        rows.append((first["prompt"], first["family"], images))
    return rows


def run(args: argparse.Namespace) -> None:
    register_resolvers()
    quieten()
    words = args.words
    subjects = [Subject.read(word) for word in words if is_subject(word)]
    overrides = [word for word in words if not is_subject(word)]
    if not subjects:
        raise ValueError("nothing to evaluate; give `base`, run folders or LoRA folders")
    if len({subject.label for subject in subjects}) < len(subjects):
        raise ValueError("two subjects have one name; name them as in before=base after=outputs/latest")
    common = configure(subjects, overrides, args.prompts)
    configs = {subject.label: own_config(subject, common, overrides) for subject in subjects}
    evaluators: dict[str, Evaluator] = {label: instantiate(cfg.evaluation) for label, cfg in configs.items()}
    evaluator = evaluators[subjects[0].label]
    features: Any = Inception(args.inception) if args.inception else RandomConv()
    reference = folder_features(args.reference, features) if args.reference else None
    out, assessments = Path(args.out), {}
    for subject in subjects:
        label, cfg = subject.label, configs[subject.label]
        assessments[label] = each = Assessment(out / label, evaluators[label], settings(subject, cfg))
        if not each.is_complete:
            with loaded(subject, cfg) as policy:
                each.run(policy)
    results = summarise(assessments, features, reference, args.reference)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    has_one_grid = all(each.intervals == evaluator.intervals for each in evaluators.values())
    subtitle = (
        f"{evaluator.images_per_prompt} images a prompt, {len(evaluator.intervals)} steps of "
        f"{type(evaluator.solver).__name__}, guidance {evaluator.guidance_scale:g}, the same noise for all"
        f"{'.' if has_one_grid else ', each on its own sigma grid.'}"
    )
    galleries = {name: gallery(assessments, evaluator, name, args.shown) for name in evaluator.sets}
    (out / "page.html").write_text(page(" and ".join(assessments), subtitle, results, galleries))
    for name, summaries in results.items():
        for label, each in summaries.items():
            reward = each["metrics"].get("reward")
            shown = "no reward" if reward is None else "reward {mean:.4f} ({low:.4f} to {high:.4f})".format(**reward)
            print(f"{name:<12} {label:<24} {shown}")
    print(f"{out}/page.html")


def is_subject(word: str) -> bool:
    """Whether a word of the command line names a subject, not an override such as reward=ocr."""
    name, _, place = word.rpartition("=")
    is_option = "." in name or (CONF / name).is_dir() if name else False
    return not is_option and (not name or place == "base" or Path(place).expanduser().is_dir())


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="subjects, then overrides")
    parser.add_argument("--out", default="outputs/evaluation", help="where everything is written")
    parser.add_argument("--prompts", help="a text file, one prompt a line, in place of the configured sets")
    parser.add_argument("--reference", help="folder of real pictures to measure distances from, not the first subject")
    parser.add_argument("--inception", help="torch-fidelity's weights file, for FID and KID proper")
    parser.add_argument("--shown", type=int, default=16, help="prompts of each set whose images are on the page")
    return parser


def main() -> int:
    return one_line_errors(partial(run, parser().parse_intermixed_args()))


if __name__ == "__main__":
    sys.exit(main())
