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

from flowrl.errors import UserError
from flowrl.launch.saved import read_saved
from flowrl.runs.command_line import TRAIN, escape
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
"""What is taken from Hydra's own configuration as it is."""
OF_JOB = ("name", "chdir", "num", "id")
"""What is taken from `hydra.job`, beside its variables of the environment."""


def freeze(cfg: DictConfig | ListConfig) -> None:
    """Replace, in place, what `${hydra:...}` and `${now:...}` mean in this launch by their values.

    Another process, or the same run resumed, has other choices, another number and another time.
    What has no value in this launch stays as it is.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        if isinstance(value, dict | list):
            freeze(cfg[key])
        elif isinstance(value, str) and _OF_THIS_LAUNCH.search(value):
            try:
                resolved = cfg[key]
            except OmegaConfBaseException:
                continue
            if OmegaConf.is_config(resolved):
                resolved = OmegaConf.to_container(resolved, resolve=True)
            with read_write(cfg):
                cfg[key] = escape(resolved) if isinstance(resolved, str) else resolved


def job_of(cfg: DictConfig, folder: str | Path, *, is_started_by_hydra: bool = False) -> Job:
    """The job of a composed configuration, of which HydraConfig holds Hydra's part.

    `is_started_by_hydra` says that Hydra's callbacks were called already, by the launcher's worker.
    """
    hydra = HydraConfig.get()
    left_out = ("callbacks",) if is_started_by_hydra else ()
    job = _job(cfg, Path(folder).absolute(), hydra.job.num, tuple(hydra.overrides.task))
    job.composed = _as_file(cfg, hydra, job.folder, left_out)
    return job


def read_job(folder: Path) -> tuple[Job, DictConfig] | None:
    """The job in `folder` and what it was composed as; None where the folder has no such file.

    Raises UserError for a file that is no job's configuration.
    """
    path = folder / COMPOSED
    if not path.is_file():
        return None
    cfg = read_saved(path, DAMAGED)
    try:
        return _job(cfg, folder, cfg.hydra.job.num, ()), cfg
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); {DAMAGED}") from error


def _job(cfg: DictConfig, folder: Path, number: int, overrides: tuple[str, ...]) -> Job:
    has_threads = "num_threads" not in cfg or cfg.num_threads is not None
    num_processes = num_ranks(cfg.trainer.devices)
    return Job(
        number, overrides, folder, num_processes, cfg.num_iterations, has_threads=has_threads
    )


def _as_file(cfg: DictConfig, hydra: Any, folder: Path, left_out: tuple[str, ...]) -> str:
    task = copy.deepcopy(cfg)
    with read_write(task), open_dict(task):
        task.pop("hydra", None)
        if "run_dir" in task:
            task.run_dir = escape(str(folder))
    task._set_parent(None)
    freeze(task)
    job = {key: hydra.job[key] for key in OF_JOB if not OmegaConf.is_missing(hydra.job, key)}
    # Variables to copy are copied from the job's environment; their values, perhaps keys, do not
    # belong in a file.
    job["env_set"] = {
        key: value for key, value in hydra.job.env_set.items() if key not in hydra.job.env_copy
    }
    job["env_copy"] = list(hydra.job.env_copy)
    kept = OmegaConf.masked_copy(hydra, [key for key in KEPT if key not in left_out])
    kept._set_parent(None)
    own = OmegaConf.create(OmegaConf.to_container(kept, resolve=False))
    assert isinstance(own, DictConfig)
    freeze(own)
    own.job = job
    own.run = {"dir": escape(str(folder))}
    own.runtime = {
        "choices": {
            key: hydra.runtime.choices[key] for key in hydra.runtime.choices if "hydra/" not in key
        }
    }
    return HEAD + OmegaConf.to_yaml(task) + OmegaConf.to_yaml(OmegaConf.create({"hydra": own}))


def calling_script() -> Path:
    """The script whose task function is being called; in a launcher's worker the main module is
    another one.
    """
    # A function that was pickled by value keeps its module's `__name__` and `__file__`, but not its
    # code's file.
    modules = [frame.frame.f_globals for frame in inspect.stack()]
    mains = (module for module in modules if module.get("__name__") == "__main__")
    path = next((Path(module["__file__"]) for module in mains if module.get("__file__")), TRAIN)
    return path.absolute()
