"""The composed configuration of a sweep's job, as the file that the job's process starts from.

A job does not compose again: flags of the command line, files on its search path, the working
directory and the time may differ by then. What was composed is written to the job's folder, and
Hydra reads that file as the whole configuration: `python SCRIPT --config-path FOLDER --config-name
job`.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from flowrl.launch import labels
from flowrl.launch.lora_keys import take_from_file
from flowrl.launch.saved import read_saved
from flowrl.runs.command_line import escape
from flowrl.runs.files import damaged
from flowrl.runs.installation import TRAIN
from flowrl.sweep.job import COMPOSED, Job, num_ranks

_OF_THIS_LAUNCH = re.compile(r"\$\{\s*(hydra|now)\s*:")
DAMAGED = "remove it, and start the sweep again with its overrides: the job is composed again"
"""What to do about a job's file that cannot be read."""
HEAD = """\
# The job's configuration as the sweep composed it, and Hydra's own; train.py starts from it.
defaults:
- _self_
- override hydra/job_logging: none
- override hydra/hydra_logging: none
"""
KEPT = ("job_logging", "hydra_logging", "output_subdir", "callbacks", "verbose")
"""The keys that are taken from Hydra's own configuration as they are."""
OF_JOB = ("name", "chdir", "num", "id")
"""The keys that are taken from `hydra.job`, beside its variables of the environment."""


def freeze(cfg: DictConfig | ListConfig) -> None:
    """Replace, in place, what `${hydra:...}` and `${now:...}` mean in this launch by their values.

    Another process, or the same run resumed, has other choices, another number and another time.
    What has no value in this launch stays as it is.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    entries = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in entries:
        if isinstance(value, dict | list):
            freeze(cfg[key])
        elif isinstance(value, str) and _OF_THIS_LAUNCH.search(value):
            _freeze_value(cfg, key)


def _freeze_value(cfg: DictConfig | ListConfig, key: Any) -> None:
    """Replace the interpolation at `key` by its value, where it has one."""
    try:
        value = cfg[key]
    except OmegaConfBaseException:
        return
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    # A value may itself hold `${`, which must not be resolved once more.
    if isinstance(value, str):
        value = escape(value)
    with read_write(cfg):
        cfg[key] = value


def is_composed(hydra: Any) -> bool:
    """Tell from Hydra's own configuration whether this process started from a job's file."""
    return str(hydra.job.config_name) == Path(COMPOSED).stem


def job_of(cfg: DictConfig, folder: str | Path, *, is_started_by_hydra: bool = False) -> Job:
    """Return the job of a composed configuration, of which HydraConfig holds Hydra's part.

    `is_started_by_hydra` says that Hydra's callbacks were called already, by the launcher's worker.
    """
    hydra = HydraConfig.get()
    left_out = ("callbacks",) if is_started_by_hydra else ()
    job = _job(cfg, Path(folder).absolute(), hydra.job.num, tuple(hydra.overrides.task))
    job.composed = _as_file(cfg, hydra, job.folder, left_out)
    return job


def read_job(folder: Path) -> tuple[Job, DictConfig] | None:
    """Read the job in `folder` and what it was composed as; None where the folder has no such file.

    Raises UserError for a file that is no job's configuration.
    """
    path = folder / COMPOSED
    if not path.is_file():
        return None
    cfg = read_saved(path, DAMAGED)
    try:
        return _job(cfg, folder, cfg.hydra.job.num, ()), cfg
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise damaged(path, error, DAMAGED) from error


def _job(cfg: DictConfig, folder: Path, number: int, overrides: tuple[str, ...]) -> Job:
    """Return the job of a configuration, as far as that tells it."""
    # A script without such a key cannot be told a number, which counts as having one.
    has_threads = "num_threads" not in cfg or cfg.num_threads is not None
    return Job(
        number=number,
        overrides=overrides,
        folder=folder,
        num_processes=num_ranks(cfg.trainer.devices),
        num_iterations=cfg.num_iterations,
        has_threads=has_threads,
    )


def _as_file(cfg: DictConfig, hydra: Any, folder: Path, left_out: tuple[str, ...]) -> str:
    """Write out a job's file: what the task is run with, and Hydra's part of it."""
    place = escape(str(folder))
    task = copy.deepcopy(cfg)
    with read_write(task), open_dict(task):
        task.pop("hydra", None)
        if "run_dir" in task:
            task.run_dir = place
    # A copy keeps its parent, in which its interpolations would be looked up.
    task._set_parent(None)
    freeze(task)
    with read_write(task):
        # Here, where it is known what was typed; the script may be one without LoRA.
        if task.get("lora"):
            take_from_file(task, hydra.overrides.task)
        labels.fill(task, hydra, Path(hydra.sweep.dir))
    kept = [key for key in KEPT if key not in left_out]
    copied = OmegaConf.masked_copy(hydra, kept)
    copied._set_parent(None)
    # Made anew from plain values, free of Hydra's schema.
    settings = OmegaConf.create(OmegaConf.to_container(copied, resolve=False))
    assert isinstance(settings, DictConfig)
    freeze(settings)
    settings.job = _job_settings(hydra.job)
    settings.run = {"dir": place}
    # The choices of Hydra's own groups are in what they have set.
    choices = {key: value for key, value in hydra.runtime.choices.items() if "hydra/" not in key}
    settings.runtime = {"choices": choices}
    of_task = OmegaConf.to_yaml(task)
    of_hydra = OmegaConf.to_yaml(OmegaConf.create({"hydra": settings}))
    return HEAD + of_task + of_hydra


def _job_settings(job: Any) -> dict[str, Any]:
    """Return what is kept of `hydra.job`.

    Variables to copy are copied from the job's environment; their values, perhaps keys, do not
    belong in a file.
    """
    settings = {key: job[key] for key in OF_JOB if not OmegaConf.is_missing(job, key)}
    copied = list(job.env_copy)
    variables = {name: value for name, value in job.env_set.items() if name not in copied}
    return settings | {"env_set": variables, "env_copy": copied}


def calling_script() -> Path:
    """Find the script whose task function is being called; in a launcher's worker the main module
    is another one.
    """
    # A function that was pickled by value keeps its module's `__name__` and `__file__`, but not its
    # code's file.
    modules = [frame.frame.f_globals for frame in inspect.stack()]
    for module in modules:
        if module.get("__name__") == "__main__" and module.get("__file__"):
            return Path(module["__file__"]).absolute()
    return TRAIN
