"""`hydra/launcher=pool`: the jobs of a sweep in processes of their own, on the devices of this
machine.

No published launcher does this: the basic one runs jobs one after the other inside one process,
joblib's and Ray's inside reused workers, without devices of their own (joblib) or process groups
(both), and submitit's local executor gives every job the same devices. In all of them a job on
several devices restarts the whole sweep in its child ranks.
"""

from __future__ import annotations

import atexit
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from flowrl.errors import UserError
from flowrl.launch.compose import check_folder
from flowrl.launch.composed import job_of, read_job
from flowrl.launch.foreign_jobs import check_job, check_sweep, continue_command
from flowrl.launch.foreign_targets import KEY, is_trusting, parse
from flowrl.launch.labels import HYDRAS
from flowrl.launch.search_path import project_folders
from flowrl.runs.command_line import tool_command
from flowrl.sweep.job import Job, JobsFailed, has_key, objective
from flowrl.sweep.plan import Overrides, Place, Sweep, find_places, read_sweep, write_sweep
from flowrl.sweep.pool import Pool, Slots, find_slots
from flowrl.values.plural import counted


class PoolLauncher(Launcher):
    """The launcher whose options `conf/hydra/launcher/pool.yaml` explains."""

    def __init__(
        self, slots: int | None, fail_fast: bool, grace_seconds: float, refresh_seconds: float
    ) -> None:
        self.slots = slots
        self.is_fail_fast = fail_fast
        self.grace = grace_seconds
        self.refresh = refresh_seconds
        self.config: DictConfig
        self.hydra_context: HydraContext
        self.script: Path

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what a sweep has in common. Each job calls the task function's script in processes
        of its own.
        """
        self.config = config
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        if missing:
            atexit.register(discard_decoy, missing)
        self.hydra_context = hydra_context
        self.script = Path(inspect.getfile(inspect.unwrap(task_function))).absolute()

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of jobs. A failed one's JobReturn holds JobsFailed, which tells of all of
        them.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        wanted = [tuple(filter_overrides(overrides)) for overrides in job_overrides]
        is_trusted = any(is_trusting(overrides) for overrides in wanted)
        earlier = find_earlier(wanted)
        folder = earlier or Path(str(self.config.hydra.sweep.dir)).absolute()
        if earlier is None:
            sweep = Sweep(self.script, Path.cwd(), tuple(wanted))
        else:
            sweep = read_sweep(earlier)
        if not is_trusted:
            self._check(folder, sweep, is_continued=earlier is not None)
        check_folder("hydra.sweep.dir", str(folder))
        jobs, configs = self._jobs(folder, sweep.jobs, is_continued=earlier is not None)
        for job in jobs:
            job.is_trusted = True  # what the folders hold was checked, or is trusted
        write_sweep(
            folder,
            jobs,
            is_new=initial_job_idx == 0,
            script=sweep.script,
            directory=sweep.directory,
        )
        self._run(folder, sweep, jobs)
        return self._returns(jobs, configs, folder)

    def _run(self, folder: Path, sweep: Sweep, jobs: Sequence[Job]) -> None:
        """Run the jobs that wait, on this machine's devices."""
        missing = [job for job in jobs if job.state == "waiting"]
        for job in missing:
            job.prepare()
        num_processes = sum(job.num_processes for job in missing)
        slots = find_slots(self.slots, count_gpus(), num_processes or 1)
        print(
            f"sweep {folder}: {len(missing)} of {counted(len(jobs), 'job')} to run\n"
            f"  on {counted(len(slots.names), 'slot')} ({_described(slots)})"
        )
        pool = Pool(
            slots,
            is_fail_fast=self.is_fail_fast,
            grace=self.grace,
            refresh=self.refresh,
            group=folder.name,
            script=sweep.script,
            directory=sweep.directory if sweep.directory.is_dir() else Path.cwd(),
        )
        try:
            pool.run(jobs)
        except KeyboardInterrupt:
            print(f"\nstopped. Continue with: {self._continue(folder, jobs)}")
            raise

    def _check(self, folder: Path, sweep: Sweep, *, is_continued: bool) -> None:
        """Check what the folder of a sweep would have started: its record where it is continued by
        its folder, and what each job's folder holds. What the user typed vouches for itself.
        """
        conf = project_folders(self.config.hydra, leaving_out=folder)
        if is_continued:
            check_sweep(folder, sweep, self.script, conf)
        for overrides, place in zip(sweep.jobs, find_places(folder, sweep.jobs), strict=True):
            if place.folder is not None:
                check_job(place.folder, conf, () if is_continued else overrides)

    def _jobs(
        self, folder: Path, wanted: Sequence[Overrides], *, is_continued: bool
    ) -> tuple[list[Job], list[DictConfig]]:
        """Return the jobs, and what each of them was composed as.

        Where the sweep is continued by its folder, and wherever a run has begun, that is what the
        job's folder holds, whatever the flags and files of this launch are.
        """
        jobs: list[Job] = []
        configs: list[DictConfig] = []
        for overrides, place in zip(wanted, find_places(folder, wanted), strict=True):
            earlier = read_job(place.folder) if place.folder is not None else None
            if earlier is not None and (is_continued or earlier[0].is_begun):
                job, config = earlier
            else:
                job, config = self._compose(folder, overrides, place)
            job.number = place.number
            job.overrides = overrides
            job.seconds = place.seconds
            job.state = "finished" if job.is_finished else "waiting"
            if job.folder in [other.folder for other in jobs]:
                raise UserError(
                    f"hydra.sweep.subdir: two jobs would write to {job.folder}; let it hold "
                    f"${{hydra:job.num}}"
                )
            jobs.append(job)
            configs.append(config)
        return jobs, configs

    def _compose(
        self, folder: Path, overrides: Sequence[str], place: Place
    ) -> tuple[Job, DictConfig]:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = str(place.number)
            config.hydra.job.num = place.number
        with hydra_config(config):
            path = place.folder or folder / str(config.hydra.sweep.subdir)
        with open_dict(config):
            config.hydra.runtime.output_dir = str(path)
        with hydra_config(config):
            return job_of(config, path), config

    def _continue(self, folder: Path, jobs: Sequence[Job]) -> str:
        return continue_command(
            folder, [job.folder for job in jobs], self.config.hydra, is_sweep=True
        )

    def _returns(
        self, jobs: Sequence[Job], configs: Sequence[DictConfig], folder: Path
    ) -> list[JobReturn]:
        unfinished = [job for job in jobs if job.state != "finished"]
        endings = [f"job {job.number} {job.state} {job.problem}".strip() for job in unfinished]
        failure = JobsFailed(
            f"{len(unfinished)} of {len(jobs)} jobs did not finish: {'; '.join(endings)}. Each has "
            f"its job.log in {folder}; `{self._continue(folder, jobs)}` runs what is missing"
        )
        returns = []
        for job, config in zip(jobs, configs, strict=True):
            done = JobReturn(overrides=list(job.overrides), cfg=config, working_dir=str(job.folder))
            if job in unfinished:
                done.status = JobStatus.FAILED
                done.return_value = failure
            else:
                done.status = JobStatus.COMPLETED
                done.return_value = objective(job.folder, config.objective)
            returns.append(done)
        if not unfinished:
            report = tool_command("report", "report.py", str(folder))
            print(f"all {len(jobs)} jobs finished: {folder}\nCompare them with: {report}")
        return returns


def discard_decoy(made: Sequence[Path]) -> None:
    """Remove the folder of a sweep, and those above that were made for it, where it holds nothing
    but what Hydra writes before a sweep begins: it was refused, or goes on elsewhere.
    """
    folder = made[0]
    if [path.name for path in folder.glob("*")] != [HYDRAS]:
        return
    (folder / HYDRAS).unlink()
    for path in made:
        with suppress(OSError):
            path.rmdir()


def _described(slots: Slots) -> str:
    """Name the slots, and how many threads each of the CPU's has."""
    names = ", ".join(slots.names)
    if not slots.threads:
        return names
    return f"{names}, {counted(slots.threads, 'thread')} each"


def find_earlier(wanted: Sequence[Overrides]) -> Path | None:
    """Return the folder of an earlier sweep, where `resume=FOLDER`, perhaps trusted, is all that is
    asked for.

    Raises UserError where `resume` stands among other overrides.
    """
    if not any(has_key(overrides, "resume") for overrides in wanted):
        return None
    asked = [item for item in parse(wanted[0]) if item.key_or_group != KEY]
    if len(wanted) > 1 or len(asked) > 1:
        raise UserError(
            "resume= in a sweep stands alone: it continues the jobs of that folder with their "
            "overrides"
        )
    value = asked[0].value()
    return Path(str(OmegaConf.create({"resume": value}).resume)).resolve()


@contextmanager
def hydra_config(config: DictConfig) -> Iterator[None]:
    """Let `${hydra:...}` mean a job's configuration for a while."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before
        OmegaConf.set_readonly(config.hydra, None)


def count_gpus() -> int:
    """Count CUDA devices without starting CUDA in this process."""
    import torch  # a misspelt override is answered before this takes its seconds

    return torch.cuda.device_count()
