"""Evaluate base models, runs and LoRA folders side by side, into one page.

    python scripts/evaluate.py base outputs/latest                        # before and after, on the run's own sets
    python scripts/evaluate.py base outputs/a outputs/b/lora --out outputs/compared
    python scripts/evaluate.py base outputs/latest --prompts prompts.txt reward=clip_score
    python scripts/evaluate.py base outputs/latest --prompts geneval2_data.jsonl reward=geneval2

A subject is `base` (the configured base model), the folder of a run (its model, what it exported or else its newest
checkpoint's average), or a folder with a LoRA or a whole transformer for the configured base model; `NAME=SUBJECT`
gives it a name.
Words with `=` after the subjects are overrides of train.py. Where they choose no reward, model or evaluation, those of
the first run are taken. A .jsonl file of --prompts holds objects with a `prompt`, its metadata, and its task family
under `family`, GenEval's `tag` or GenEval2's `atom_count`. All subjects draw the same prompts from the same noise, each
on the sigma grid that its run was trained with. An evaluation that was stopped goes on with the same command.

Below --out: SUBJECT/SET/images/*.png and samples.jsonl, results.json, and page.html, one file without links.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowrl.assessment.distances import Inception, RandomConv
from flowrl.assessment.page import render
from flowrl.assessment.pictures import folder_features
from flowrl.assessment.samples import Assessment
from flowrl.assessment.subjects import Subject
from flowrl.assessment.summary import gallery, summarise
from flowrl.errors import UserError
from flowrl.evaluation import Evaluator
from flowrl.launch.build import build
from flowrl.launch.compose import CONF, compose
from flowrl.launch.errors import one_line_errors
from flowrl.launch.quiet import quieten
from flowrl.launch.resume import read_source
from flowrl.modules.policy import Policy
from flowrl.prompts.jsonl import family_key
from flowrl.runs.files import CONFIG, SOURCE

TRAINED = ("model", "lora", "grid", "tuning")
"""Of the configuration: what a run's weights belong to."""
OWN = (*TRAINED, "schedule", "backend", "embeddings")
"""What each run is drawn with; overrides of the last three reach all subjects."""


def configure(subjects: Sequence[Subject], overrides: Sequence[str], prompts: str | None) -> DictConfig:
    """The common configuration: the overrides', or the first run's where they leave it open."""
    cfg = compose(["name=evaluation", "logger=none", *overrides])
    first = next((subject for subject in subjects if subject.is_run), None)
    OmegaConf.set_struct(cfg, False)
    if first is not None:
        chosen = groups(overrides)
        kept = [key for key in ("reward", "evaluation", "data") if key not in chosen]
        # Another base model comes with its own grid, layers and backend.
        kept += [key for key in OWN if key not in chosen] if "model" not in chosen else []
        cfg = taken(cfg, run_config(first), kept, overrides)
    if prompts is not None:
        cfg.evaluation.sets = {Path(prompts).stem: prompt_set(prompts)}
    return cfg


def prompt_set(path: str) -> dict[str, Any]:
    """A file of prompts as a configuration; a .jsonl file's own key of task families is found."""
    if not path.endswith(".jsonl"):
        return {"_target_": "flowrl.prompts.text.text_prompts", "path": path}
    options = {"text": "prompt", "family": family_key(path), "required": []}
    return {"_target_": "flowrl.prompts.jsonl.jsonl_prompts", "path": path, **options}


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
    return read_source(subject.folder, SOURCE if (subject.folder / SOURCE).is_file() else CONFIG)


def own_config(subject: Subject, common: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The common configuration on the subject's own model and sigma grid, without training prompts."""
    cfg = common.copy()
    if subject.is_run:
        keys = [key for key in OWN if key in TRAINED or key not in groups(overrides)]
        cfg = taken(cfg, run_config(subject), keys, overrides)
    else:
        cfg.tuning = {"_target_": "flowrl.models.full.Full", "dtype": "float32"} if subject.is_full else "${lora}"
        cfg.model.dtype = "float32" if subject.is_full else cfg.model.dtype
    # Resolved first: its prompts may be said to be the training prompts.
    cfg.evaluation = OmegaConf.to_container(cfg.evaluation, resolve=True)
    cfg.data.prompts = []  # nothing is trained, so no training prompt needs to be encoded
    return cfg


def load(subject: Subject, cfg: DictConfig) -> Policy:
    """The policy of a subject, on the GPU where there is one."""
    policy, _, _ = build(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    for frozen in (policy.model, policy.embed, policy.reward):
        frozen.to(device)
    subject.load_into(policy)
    return policy


def run(args: argparse.Namespace) -> None:
    quieten()
    subjects = [Subject.read(word) for word in args.words if is_subject(word)]
    overrides = [word for word in args.words if not is_subject(word)]
    if not subjects:
        raise UserError("nothing to evaluate; give `base`, run folders or LoRA folders")
    if len({subject.label for subject in subjects}) < len(subjects):
        raise UserError("two subjects have one name; name them as in before=base after=outputs/latest")
    common = configure(subjects, overrides, args.prompts)
    configs = [own_config(subject, common, overrides) for subject in subjects]
    evaluators: list[Evaluator] = [instantiate(cfg.evaluation) for cfg in configs]
    network = Inception(args.inception) if args.inception else RandomConv()
    reference = (args.reference, folder_features(args.reference, network)) if args.reference else None
    out, assessments = Path(args.out), {}
    for subject, cfg, evaluator in zip(subjects, configs, evaluators, strict=True):
        settings = subject.settings(plain(cfg))
        assessments[subject.label] = each = Assessment(out / subject.label, evaluator, settings)
        if not each.is_complete:
            each.run(load(subject, cfg))
    results = summarise(assessments, network, reference)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    galleries = {name: gallery(assessments, name, args.shown) for name in results}
    (out / "page.html").write_text(render(" and ".join(assessments), subtitle(evaluators), results, galleries))
    for name, found in results.items():
        for label, each in found.items():
            print(f"{name:<12} {label:<24} {shown(each['metrics'].get('reward'))}")
    print(f"{out}/page.html")


def plain(cfg: DictConfig) -> dict[str, Any]:
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def subtitle(evaluators: Sequence[Evaluator]) -> str:
    """How all images were drawn."""
    first = evaluators[0]
    has_one_grid = all(each.intervals == first.intervals for each in evaluators)
    grid = "" if has_one_grid else ", each on its own sigma grid"
    return (
        f"{first.images_per_prompt} images a prompt, {len(first.intervals)} steps of {type(first.solver).__name__}, "
        f"guidance {first.guidance_scale:g}, the same noise for all{grid}."
    )


def shown(reward: dict[str, Any] | None) -> str:
    if reward is None:
        return "no reward"
    interval = "" if reward["low"] is None else f" ({reward['low']:.4f} to {reward['high']:.4f})"
    return f"reward {reward['mean']:.4f}{interval}"


def is_subject(word: str) -> bool:
    """Whether a word of the command line names a subject, not an override such as reward=ocr."""
    name, _, place = word.rpartition("=")
    is_option = "." in name or (CONF / name).is_dir() if name else False
    return not is_option and (not name or place == "base" or Path(place).expanduser().is_dir())


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="subjects, then overrides")
    parser.add_argument("--out", default="outputs/evaluation", help="where everything is written")
    parser.add_argument(
        "--prompts", help="in place of the configured sets: a text file, one prompt a line, or .jsonl with metadata"
    )
    parser.add_argument("--reference", help="folder of real pictures to measure distances from, not the first subject")
    parser.add_argument("--inception", help="torch-fidelity's weights file, for FID and KID proper")
    parser.add_argument("--shown", type=int, default=16, help="prompts of each set whose images are on the page")
    return parser


def main() -> int:
    return one_line_errors(partial(run, parser().parse_intermixed_args()))


if __name__ == "__main__":
    sys.exit(main())
