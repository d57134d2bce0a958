"""Evaluate base models, runs and LoRA folders side by side, into one page.

    python scripts/evaluate.py base outputs/latest    # before and after, on the run's sets
    python scripts/evaluate.py base outputs/a outputs/b/lora --out outputs/compared
    python scripts/evaluate.py base outputs/latest --prompts prompts.txt reward=clip_score
    python scripts/evaluate.py base outputs/latest --prompts geneval2_data.jsonl reward=geneval2

A subject is `base` (the configured base model), the folder of a run (its model, what it exported or
else its newest checkpoint's average), or a file or folder with a LoRA or a whole transformer for
the configured base model; `NAME=SUBJECT` gives it a name. LoRA files are read as
scripts/generate.py reads them. Words with `=` after the subjects are overrides of train.py. Where
they choose no reward, model or evaluation, those of the first run are taken. All prompts of
--prompts are drawn: lines of text, or of JSON objects with a `prompt`, its metadata, and its task
family under `family`, GenEval's `tag` or GenEval2's `atom_count`; `evaluation.max_prompts=100`
takes as many, spread over the file. All subjects draw the same prompts from the same noise, each on
the sigma grid that its run was trained with. The drift (`kl_ref`) of a run that began from a LoRA
is measured from its own reference, that of all others from the base. An evaluation that was stopped
goes on with the same command; a page is overwritten only by one that tells of the same subjects and
others.

Below --out: SUBJECT/SET/images/*.png and samples.jsonl, results.json, and page.html, one file
without links.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.evaluation.distances import Inception, RandomConv
from flowrl.evaluation.evaluator import Evaluator
from flowrl.evaluation.page import render
from flowrl.evaluation.pictures import folder_features
from flowrl.evaluation.samples import Assessment
from flowrl.evaluation.subjects import Subject
from flowrl.evaluation.summary import gallery, summarise
from flowrl.launch.build import build
from flowrl.launch.compose import compose
from flowrl.launch.foreign_targets import check_config, parse
from flowrl.launch.interrupts import INTERRUPTED
from flowrl.launch.quiet import quieten
from flowrl.launch.saved import read_saved
from flowrl.launch.search_path import searched_folders, with_config_dir
from flowrl.launch.start import with_copy
from flowrl.launch.votes import with_votes_of
from flowrl.parallel import background
from flowrl.prompts.files import prompt_set
from flowrl.runs.command_line import key_of
from flowrl.runs.files import CONFIG, SOURCE, read_object
from flowrl.runs.installation import CONF
from flowrl.sweep.job import has_key
from flowrl.training.policy import Policy
from flowrl.tuning import formats, lora
from flowrl.tuning.weights import refer_to

TRAINED = ("model", "lora", "grid", "tuning")
"""The groups of the configuration that a run's weights belong to."""
OF_RUN = (*TRAINED, "schedule", "backend", "embeddings")
"""The groups that each run is drawn with; overrides of the last three reach all subjects."""
COMMON = ("reward", "evaluation", "data")
"""The groups of the first run that all subjects are drawn with, unless the overrides choose others.
"""

RESULTS = "results.json"
FULL = "flowrl.tuning.full.Full"
ADAPTER = {"_target_": "flowrl.tuning.lora.LoRA", "init": "gaussian", "reference": "base"}
IDLE = ADAPTER | {"rank": 1, "alpha": 1, "targets": "proj_out", "start": None}
"""What a base model is drawn through: an adapter that is zero, on the layer that all transformers
have.
"""


def configure(
    subjects: Sequence[Subject], overrides: Sequence[str], prompts: str | None
) -> DictConfig:
    """Compose the common configuration: the overrides', or the first run's where they leave it
    open.
    """
    cfg = compose(["name=evaluation", "logger=none", *overrides])
    first = next((subject for subject in subjects if subject.is_run), None)
    OmegaConf.set_struct(cfg, False)
    if first is not None:
        chosen = groups(overrides)
        # Another base model comes with its own grid, layers and backend.
        candidates = COMMON if "model" in chosen else (*COMMON, *OF_RUN)
        keys = [key for key in candidates if key not in chosen]
        cfg = with_keys_of_run(cfg, run_config(first, cfg, overrides), keys, overrides)
        assert first.path is not None
        cfg = with_votes_of(cfg, first.path)
    if prompts is not None:
        _take_prompts(cfg, prompts, overrides)
    return cfg


def _take_prompts(cfg: DictConfig, prompts: str, overrides: Sequence[str]) -> None:
    """Evaluate the prompts of a file, all of them unless the command line itself asks for a subset,
    which then is one of the whole file.
    """
    cfg.evaluation.sets = {Path(prompts).stem: prompt_set(prompts)}
    for key, value in (("max_prompts", None), ("subset", "even")):
        if not has_key(overrides, f"evaluation.{key}"):
            cfg.evaluation[key] = value


def groups(overrides: Sequence[str]) -> set[str]:
    """Return the groups that overrides choose, and those that come with them."""
    chosen = {item.split("=")[0] for item in overrides}
    if "backend" in chosen:
        chosen.add("embeddings")
    return chosen


def with_keys_of_run(
    cfg: DictConfig, saved: DictConfig, keys: Sequence[str], overrides: Sequence[str]
) -> DictConfig:
    """Give a configuration a run's `keys`, and the values below them that overrides say, read as
    Hydra reads them.
    """
    keys = [key for key in keys if key in saved]
    for key in keys:
        cfg[key] = saved[key]
    if "evaluation" in keys:
        take_references(cfg.evaluation, saved.evaluation)
    for override in parse(overrides):
        group, dot, _ = override.key_or_group.partition(".")
        if dot and group in keys and not override.is_delete():
            OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    return cfg


def take_references(evaluation: DictConfig, saved: DictConfig) -> None:
    """Replace what a run's evaluation takes from other keys, such as rollout.guidance_scale, by the
    run's values; its grid stays each subject's.
    """
    for key in map(str, saved):
        if key != "schedule" and OmegaConf.is_interpolation(saved, key):
            evaluation[key] = saved[key]


def saved_config(subject: Subject) -> DictConfig:
    """Read a run's own configuration, as it lies in its folder."""
    assert subject.path is not None
    source = subject.path / SOURCE
    path = source if source.is_file() else subject.path / CONFIG
    return read_saved(path, "put the file back, or evaluate the weights below the run's folder")


def run_config(subject: Subject, common: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Read and check a run's own configuration; `common` says whether its folder is trusted."""
    assert subject.path is not None
    return check_config(
        saved_config(subject),
        subject.path,
        is_trusted=common.trust_folder,
        conf=searched_folders(overrides, leaving_out=subject.path),
        typed={key_of(item) for item in overrides},
    )


def subject_config(subject: Subject, common: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Return the common configuration on the subject's own model and sigma grid, without training
    prompts.
    """
    cfg = common.copy()
    if subject.is_run:
        keys = [key for key in OF_RUN if key in TRAINED or key not in groups(overrides)]
        cfg = with_keys_of_run(cfg, run_config(subject, common, overrides), keys, overrides)
    else:
        cfg.tuning = {"_target_": FULL, "dtype": "float32"} if subject.is_full else "${lora}"
        cfg.model.dtype = "float32" if subject.is_full else cfg.model.dtype
    if cfg.tuning._target_ == FULL:
        cfg.lora = IDLE
    else:
        cfg.lora = adapter_config(subject)
        cfg.tuning = "${lora}"
    # Resolved first: its prompts may be said to be the training prompts.
    cfg.evaluation = OmegaConf.to_container(cfg.evaluation, resolve=True)
    cfg.data.prompts = []  # nothing is trained, so no training prompt needs to be encoded
    return cfg


def adapter_config(subject: Subject) -> dict[str, Any]:
    """Return the adapter that a subject is drawn through: its LoRA as its file has it, or an idle
    one.
    """
    if subject.path is None:
        return IDLE
    return ADAPTER | {"rank": None, "alpha": None, "targets": None, "start": str(subject.path)}


def keep_reference(subject: Subject, policy: Policy) -> None:
    """Measure a run's drift from the LoRA that it began from, where that was its reference.

    Nothing of its configuration is built here, so that it need not be checked again.
    """
    if not subject.is_run or subject.is_full:
        return
    assert subject.path is not None
    began = with_copy(saved_config(subject), subject.path).lora
    if began.get("start") and began.reference == "start":
        refer_to(policy.tuning, lora.weights_of(formats.read(Path(began.start))))


def load(subject: Subject, cfg: DictConfig) -> Policy:
    """Build the policy of a subject, on the GPU where there is one."""
    policy, _, _ = build(cfg)
    keep_reference(subject, policy)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy.to(device)
    for frozen in (policy.model, policy.embed, policy.reward):
        frozen.to(device)
    subject.load_into(policy)
    return policy


def examined(words: Sequence[str], prompts: str | None) -> tuple[list[Subject], list[DictConfig]]:
    """Read the subjects and their configurations, and see that each can be drawn, before the first
    image is.

    Raises UserError for one that cannot, and where there is none or two have one name.
    """
    overrides = [word for word in words if not is_subject(word)]
    subjects = [Subject.read(word) for word in words if word not in overrides]
    check_labels([subject.label for subject in subjects])
    common = configure(subjects, overrides, prompts)
    configs = [subject_config(subject, common, overrides) for subject in subjects]
    for subject, cfg in zip(subjects, configs, strict=True):
        if (passed_over := subject.examine(cfg.model)) is not None:
            print(f"{subject.label}: {passed_over}")
    return subjects, configs


def check_labels(labels: Sequence[str]) -> None:
    """Raise UserError where there is no subject, or two have one name."""
    if not labels:
        raise UserError("nothing to evaluate; give `base`, run folders, LoRA files or folders")
    if len(set(labels)) < len(labels):
        raise UserError(
            "two subjects have one name; name them as in before=base after=outputs/latest"
        )


def run(args: argparse.Namespace) -> None:
    """Draw what no earlier evaluation has drawn, score it, and write the page."""
    quieten()
    words = with_config_dir(args.words, args.config_dir)
    subjects, configs = examined(words, args.prompts)
    evaluators: list[Evaluator] = [instantiate(cfg.evaluation) for cfg in configs]
    network = Inception(args.inception) if args.inception else RandomConv()
    for name in evaluators[0].sets:
        print(f"{name}: {evaluators[0].describe(name)}")
    reference = None
    if args.reference:
        features, told = folder_features(args.reference, network)
        reference = (f"{args.reference} ({told})", features)
        print(f"--reference {args.reference}: {told}")
    out = Path(args.out)
    refuse_to_overwrite(out, [subject.label for subject in subjects], list(evaluators[0].sets))
    assessments = {}
    for subject, cfg, evaluator in zip(subjects, configs, evaluators, strict=True):
        assessments[subject.label] = Assessment(
            out / subject.label, evaluator, subject.settings(plain(cfg))
        )
    for subject, cfg in zip(subjects, configs, strict=True):
        if not assessments[subject.label].is_complete:
            assessments[subject.label].run(load(subject, cfg))
    results = summarise(assessments, network, reference)
    (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    galleries = {name: gallery(assessments, name, args.shown) for name in results}
    (out / "page.html").write_text(
        render(" and ".join(assessments), subtitle(evaluators), results, galleries)
    )
    print_rewards(results)
    print(f"{out}/page.html")


def refuse_to_overwrite(out: Path, labels: Sequence[str], sets: Sequence[str]) -> None:
    """Raise UserError where a page in `out` tells of subjects or sets of prompts that the next one
    would not.

    What was drawn would stay, since each subject has its folder, but no page would show it.
    """
    path = out / RESULTS
    if not path.is_file():
        return
    earlier = read_object(path, "remove it, or give another --out")
    if lost := [name for name in earlier if name not in sets]:
        raise UserError(
            f"{out} holds an evaluation on other prompts ({', '.join(lost)}), whose page would be "
            "overwritten; give another --out"
        )
    told = {label for subjects in earlier.values() for label in subjects}
    if lost := sorted(told - {*labels}):
        raise UserError(
            f"{out} holds an evaluation of {', '.join(lost)} too, whose page would be overwritten; "
            "name all subjects in one command, which draws none of them again, or give another "
            "--out"
        )


def print_rewards(results: dict[str, Any]) -> None:
    """Print the reward of each subject on each set of prompts."""
    for name, subjects in results.items():
        for label, result in subjects.items():
            print(f"{name:<12} {label:<24} {shown(result['metrics'].get('reward'))}")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as a plain container, its interpolations resolved."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def subtitle(evaluators: Sequence[Evaluator]) -> str:
    """Say in one sentence how all images were drawn."""
    first = evaluators[0]
    grids = [(evaluator.schedule, evaluator.num_steps) for evaluator in evaluators]
    has_one_grid = all(grid == grids[0] for grid in grids)
    grid = "" if has_one_grid else ", each on its own sigma grid"
    return (
        f"{first.images_per_prompt} images a prompt, {first.num_steps} steps of "
        f"{type(first.solver).__name__}, guidance {first.guidance_scale:g}, the same noise for "
        f"all{grid}."
    )


def shown(reward: dict[str, Any] | None) -> str:
    """Put a reward and its interval into words."""
    if reward is None:
        return "no reward"
    interval = "" if reward["low"] is None else f" ({reward['low']:.4f} to {reward['high']:.4f})"
    return f"reward {reward['mean']:.4f}{interval}"


def is_subject(word: str) -> bool:
    """Tell whether a word of the command line names a subject, not an override such as reward=ocr
    or rollout.num_steps=8.

    With a name before it that no key of the configuration has, a path that exists or looks like one
    is a subject; what else there is goes to Hydra, which says what key may have been meant.
    """
    name, _, place = word.rpartition("=")
    if not name:
        return True
    if name.startswith(("+", "~")) or is_key(name):
        return False
    return (
        place == "base"
        or Path(place).expanduser().exists()
        or "/" in place
        or place.endswith(formats.SUFFIX)
    )


def is_key(name: str) -> bool:
    """Tell whether the configuration has a group or a value of this name: `lora`, which has keys
    below it, has no value.
    """
    config = OmegaConf.load(CONF / "config.yaml")
    assert isinstance(config, DictConfig)
    first, dot, _ = name.partition(".")
    group = first.partition("@")[0].partition("/")[0]
    if (CONF / group).is_dir():
        return True
    return first in config and (bool(dot) or not OmegaConf.is_dict(config[first]))


def main() -> int:
    """Run the evaluation, and end the process with its status."""
    args = argparse.Namespace()
    parser = arguments.evaluate()
    status = run_program(lambda: run(parser.parse_intermixed_args(namespace=args)), computes=True)
    if status == INTERRUPTED:
        print(f"\nstopped; the same command goes on from what is in {args.out}")
    background.leave(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
