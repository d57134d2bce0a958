"""One training run: from a composed configuration to a fitted policy, its exported weights and its
summary.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig

from flowrl.callbacks import trackers
from flowrl.callbacks.checkpoint import NO_CHECKPOINT, Checkpoint
from flowrl.callbacks.evaluate import Evaluate
from flowrl.callbacks.parity import ParityCheck
from flowrl.callbacks.record import RunRecord
from flowrl.callbacks.rehearsal import Rehearse
from flowrl.callbacks.stop import Stop
from flowrl.callbacks.votes import FollowVotes, votes_in
from flowrl.errors import NotFinite
from flowrl.evaluation.evaluator import Evaluator
from flowrl.launch import foreign_targets
from flowrl.launch.build import build
from flowrl.launch.changes import Provenance, refuse_without_iterations
from flowrl.launch.checks import check_accelerator, emulation
from flowrl.launch.composed import calling_script, job_of
from flowrl.launch.errors import one_line_errors
from flowrl.launch.foreign_jobs import check_job, continue_command
from flowrl.launch.labels import columns
from flowrl.launch.quiet import quieten
from flowrl.launch.resume import configure, write_config
from flowrl.launch.search_path import project_folders
from flowrl.launch.start import keep_copy, with_copy
from flowrl.launch.teachers import keep_copies, with_copies
from flowrl.launch.votes import with_folder as with_votes_folder
from flowrl.parallel import background
from flowrl.parallel.strategies import is_later_rank
from flowrl.runs import disk
from flowrl.runs.changes import Change
from flowrl.runs.files import CONFIG, LOG
from flowrl.runs.folder import discard_if_empty
from flowrl.sweep.ranks import run_to_end
from flowrl.training.learning import NothingLearned
from flowrl.training.memory import OutOfMemory
from flowrl.training.policy import Policy
from flowrl.training.prompt_data import PromptData
from flowrl.training.reward import TooManyMissingRewards

log = logging.getLogger(__name__)


def run_job(cfg: DictConfig) -> float | None:
    """Run the task of train.py: a job of a sweep is a process of its own; alone, a failure ends in
    one line.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    # Under another launcher than our own, which calls train.py itself.
    if hydra.mode == RunMode.MULTIRUN:
        if not cfg.get(foreign_targets.KEY):
            conf = project_folders(hydra, leaving_out=folder)
            check_job(folder, conf, tuple(hydra.overrides.task))
        job = job_of(cfg, folder, is_started_by_hydra=True)
        job.is_trusted = True  # what its folder holds was checked, or is trusted
        return run_to_end(job, cfg.objective, calling_script(), Path(hydra.runtime.cwd))
    status = one_line_errors(partial(run, cfg), log=folder / LOG)
    if status:
        # A run that is refused before it wrote anything leaves no folder behind.
        discard_if_empty(hydra.runtime.output_dir)
    # It may end the process, so nothing that must happen stands below.
    background.leave(status)
    if status:
        sys.exit(status)
    return None


def run(cfg: DictConfig) -> None:
    """Train in the run's own folder, from the start or from the newest checkpoint of `resume`.

    Raises DiskFull, which says how to go on, where the disk is full, and all that training raises.
    """
    cfg, changes = configure(cfg)
    quieten()
    folder = Path(cfg.run_dir)
    try:
        _train(cfg, folder, changes)
    except Exception as error:
        if not disk.is_full(error):
            raise
        # Where a checkpoint did not fit, its error says how much it takes.
        if isinstance(error, disk.DiskFull):
            text = str(error)
        else:
            text = f"{folder}: no space left ({disk.free(folder)} free)"
        # Without its configuration there is nothing to resume.
        if (folder / CONFIG).is_file():
            remedy = f"continue with: {_continue(folder)}"
        else:
            remedy = "run it again"
        raise disk.DiskFull(f"{text}; make some, then {remedy}") from error


def _train(cfg: DictConfig, folder: Path, changes: Sequence[Change]) -> None:
    """Set the run up, train, and write its summary however that ends. All processes call it.

    What can be refused is refused before weights load, and nothing is written before everything is
    built.
    """
    check_accelerator(cfg)
    record = RunRecord(folder=str(folder))
    provenance = Provenance(cfg, folder, HydraConfig.get().overrides.task)
    provenance.check_paths()
    # Before weights load: whether a tracker can be reached is answered in seconds.
    loggers: list[Logger] = _instantiated(cfg.logger)
    policy, data, evaluator = build(
        with_votes_folder(with_copies(with_copy(cfg, folder), folder), folder),
        provenance.check_prompts,
    )
    # Again, since loading may have moved a hub repository to a newer commit.
    provenance.check_paths()
    stop = Stop()
    saver = Checkpoint(record=record, stop=stop, folder=str(folder), **cfg.checkpoint)
    data.start_iteration = saver.resume_from(policy)
    refuse_without_iterations(folder, changes, data.start_iteration, len(data.iterations))
    # One process writes; the others read nothing of this.
    if not is_later_rank():
        provenance.tell_changes(changes, data.start_iteration)
        write_config(cfg, folder)
        keep_copy(cfg, folder)
        keep_copies(cfg, folder)
        provenance.write()
    viewer = Evaluate(evaluator=evaluator, record=record, folder=str(folder), **cfg.viewing)
    print("\n".join([f"run directory: {folder}", "batch plan:", *_plan(policy)]))
    if data.start_iteration:
        print(f"  resuming after iteration  {data.start_iteration}")
    # The order matters: the signal's handler stands before what works long, a model is checked and
    # the run rehearsed before it is evaluated, an evaluation's scores go into the row that the
    # record writes, and a checkpoint keeps both.
    first = [stop, *_instantiated(cfg.callbacks), *_examiners(cfg, evaluator, folder)]
    callbacks = [*first, *_followers(policy, stop, folder), viewer, record, saver]
    trainer = _trainer(cfg, callbacks, loggers)
    _prepare(loggers, cfg)
    status = "failed"
    try:
        status = _fit(trainer, policy, data, saver)
    except (OutOfMemory, TooManyMissingRewards, NotFinite, NothingLearned) as error:
        if isinstance(error, NothingLearned):
            status = "nothing learned"
        # The callback is told of no error that comes after training.
        record.error = type(error).__name__
        advice = _failure(error, policy, saver, folder)
        raise type(error)(advice) from error
    finally:
        # A full disk must not keep the trackers from being closed, which send what they have.
        try:
            if trainer.is_global_zero:
                record.write_summary(policy, status)
        finally:
            weights = folder / policy.tuning.folder_name
            _close(loggers, status, weights if status == "finished" else None)
    if status == "finished":
        print(f"finished: {folder}\n  summary.json, images/, {policy.tuning.folder_name}/")
    elif not is_later_rank():
        # Lightning would answer a later rank's exception by killing the first, which may still be
        # writing.
        print(f"\nstopped; {saver.newest()}\nContinue with: {_continue(folder)}")
        raise KeyboardInterrupt


def _examiners(cfg: DictConfig, evaluator: Evaluator, folder: Path) -> list[Callback]:
    """Return what looks at a run before its first evaluation: the check of a derived model, and the
    rehearsal where it is asked for.
    """
    examiners: list[Callback] = [ParityCheck(evaluator=evaluator, folder=str(folder))]
    # Runs from before there was the key have none.
    if cfg.get("rehearsal"):
        examiners.append(Rehearse(evaluator=evaluator, every=cfg.viewing.every))
    return examiners


def _followers(policy: Policy, stop: Stop, folder: Path) -> list[Callback]:
    """Return what follows people's votes, where the reward is fitted to them."""
    scorer = votes_in(policy)
    if scorer is None:
        return []
    return [FollowVotes(scorer=scorer, stop=stop, folder=str(folder))]


def _trainer(cfg: DictConfig, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Build the trainer, and say in a line where its device only emulates the model's dtype."""
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False)
    slow = emulation(trainer.strategy.root_device, cfg.model.dtype)
    if slow and not is_later_rank():
        print(slow)
    return trainer


def _instantiated(nodes: DictConfig | None) -> list[Any]:
    """Build each node of a group; none where the group is null."""
    if nodes is None:
        return []
    return [instantiate(node) for node in nodes.values()]


def _plan(policy: Policy) -> list[str]:
    """Return the lines of the batch plan."""
    num_trained = policy.objective.num_trained()
    lines = [policy.plan.describe(num_trained), *policy.scouting.describe()]
    if policy.regularizer is not None:
        lines.append(policy.regularizer.describe(num_trained))
    return lines


def _fit(trainer: Trainer, policy: Policy, data: PromptData, saver: Checkpoint) -> str:
    """Train, export what was learned, and return `finished`; or `stopped` after an interrupt.

    Raises NotFinite and NothingLearned, with nothing exported, where the weights are no numbers or
    never changed.
    """
    try:
        trainer.fit(policy, datamodule=data)
    except SystemExit:  # how Lightning ends on an interrupt
        return "stopped"
    # A limit of the trainer's, such as `trainer.max_time`, ends it sooner.
    if policy.num_iterations < len(data.iterations):
        return "stopped"
    policy.learning.check(policy.num_iterations)
    saver.export(trainer, policy)
    return "finished"


def _failure(error: Exception, policy: Policy, saver: Checkpoint, folder: Path) -> str:
    """Say why a run failed by its rewards, its numbers or its memory, and what to do, since it
    would go the same way again.
    """
    newest = saver.newest()
    if isinstance(error, OutOfMemory):
        again = f"; continue with: {_continue(folder)}" if policy.num_iterations else ""
        return f"{error}; {newest}{again}"
    if isinstance(error, NothingLearned):
        return f"{error}; {folder}/metrics.csv shows all iterations"
    if isinstance(error, TooManyMissingRewards):
        return f"{error}; {newest}; once the scorer works, continue with: {_continue(folder)}"
    text = f"after iteration {policy.num_iterations}: {error}; {newest}"
    if newest == NO_CHECKPOINT:
        return f"{text}: start again with a lower optimizer.lr"
    return f"{text}; continue from there with: {_continue(folder)} optimizer.lr=LOWER"


def _continue(folder: Path) -> str:
    """Return the command that continues the run in `folder`."""
    return continue_command(folder, [folder], HydraConfig.get())


def _prepare(loggers: list[Logger], cfg: DictConfig) -> None:
    """Open the trackers' runs, and give them the configuration."""
    settings = columns(cfg)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            trackers.start(logger, cfg.run_dir)
        logger.log_hyperparams(settings)


def _close(loggers: list[Logger], status: str, weights: Path | None) -> None:
    """Close the trackers' runs, in the two words that Lightning's loggers have for their end; W&B's
    may take the exported weights.
    """
    outcome = "success" if status == "finished" else "failed"
    for logger in loggers:
        logger.finalize(outcome)
        if isinstance(logger, WandbLogger):
            trackers.finish(logger, weights)
