"""`hydra/launcher=pool`: the jobs of a sweep in processes of their own, on the devices of this machine.

No published launcher does this: the basic one runs jobs one after the other inside one process, joblib's and Ray's
inside reused workers, without devices of their own (joblib) or process groups (both), and submitit's local executor
gives every job the same devices. In all of them a job on several devices restarts the whole sweep in its child ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from flowrl.launch.trust import check_overrides
from flowrl.sweep.job import TRUSTED, Job, JobsFailed, num_ranks, objective
from flowrl.sweep.plan import find_sweep, match, write_sweep
from flowrl.sweep.pool import Pool, find_slots


class PoolLauncher(Launcher):
    """See `conf/hydra/launcher/pool.yaml` for the options."""

    def __init__(self, slots: int | None, fail_fast: bool, grace_seconds: float, refresh_seconds: float) -> None:
        self.slots, self.is_fail_fast = slots, fail_fast
        self.grace, self.refresh = grace_seconds, refresh_seconds
        self.config: DictConfig
        self.hydra_context: HydraContext

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """The task function stays unused: every job is a `train.py` of its own."""
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs. A failed one's JobReturn holds JobsFailed, which tells of all of them."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        wanted = [tuple(filter_overrides(overrides)) for overrides in job_overrides]
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        is_trusted = any(TRUSTED in overrides for overrides in wanted)
        if continued := find_sweep(wanted):
            folder, wanted = continued
            for overrides in () if is_trusted else wanted:
                check_overrides(overrides, folder)
        configs = [self._compose(overrides, initial_job_idx + i) for i, overrides in enumerate(wanted)]
        jobs = match(folder, wanted, [(num_ranks(cfg.trainer.devices), cfg.num_iterations) for cfg in configs])
        for job in jobs:
            job.is_trusted = is_trusted
        write_sweep(folder, wanted, is_new=initial_job_idx == 0)
        missing = [job for job in jobs if job.state == "waiting"]
        slots = find_slots(self.slots, count_gpus(), sum(job.num_processes for job in missing) or 1)
        print(
            f"sweep {folder}: {len(missing)} of {len(jobs)} jobs to run on {len(slots.names)} slots "
            f"({', '.join(slots.names)}"
            + (f", {slots.threads} thread{'s' * (slots.threads > 1)} each)" if slots.threads else ")")
        )
        pool = Pool(slots, is_fail_fast=self.is_fail_fast, grace=self.grace, refresh=self.refresh, group=folder.name)
        try:
            pool.run(jobs)
        except KeyboardInterrupt:
            print(f"\nstopped. Continue with: python train.py -m resume={folder}")
            raise
        return self._returns(jobs, configs, folder)

    def _compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        return config

    def _returns(self, jobs: Sequence[Job], configs: Sequence[DictConfig], folder: Path) -> list[JobReturn]:
        bad = [job for job in jobs if job.state != "finished"]
        failure = JobsFailed(
            f"{len(bad)} of {len(jobs)} jobs did not finish: "
            + "; ".join(f"job {job.number} {job.state} {job.problem}".strip() for job in bad)
            + f". Each has its job.log in {folder}; `python train.py -m resume={folder}` runs what is missing"
        )
        returns = []
        for job, config in zip(jobs, configs, strict=True):
            done = JobReturn(overrides=list(job.overrides), cfg=config, working_dir=str(job.folder))
            done.status = JobStatus.FAILED if job in bad else JobStatus.COMPLETED
            done.return_value = failure if job in bad else objective(job.folder, config.objective)
            returns.append(done)
        if not bad:
            print(f"all {len(jobs)} jobs finished: {folder}. Compare them with: python scripts/report.py {folder}")
        return returns


def count_gpus() -> int:
    """CUDA devices, counted without starting CUDA in this process."""
    import torch  # a misspelt override is answered before this takes its seconds

    return torch.cuda.device_count()
