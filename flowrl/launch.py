"""From a composed configuration to a finished run: resume, checks, instantiation, fit, summary.

With `flowrl.command` the only module of the package that knows Hydra.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from flowrl.algorithm import Algorithm
from flowrl.batch_plan import BatchPlan
from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.evaluate import Evaluate
from flowrl.callbacks.record import RunRecord, write_whole
from flowrl.callbacks.stop import Stop
from flowrl.command import CONFIG, one_line_errors
from flowrl.data import PromptData
from flowrl.evaluation import Evaluator
from flowrl.losses.nft import NFT
from flowrl.models import lora
from flowrl.modules.forward import ForwardPolicy
from flowrl.modules.parallel import is_later_rank, norm_limit
from flowrl.modules.policy import Policy
from flowrl.modules.reference import ReferenceModule
from flowrl.modules.reward import RewardModule, TooManyMissingRewards
from flowrl.run_folder import claim, discard_if_empty, point_latest_at
from flowrl.sweep.job import Job, num_ranks
from flowrl.sweep.ranks import run_to_end
from flowrl.trackers import default_tags

log = logging.getLogger(__name__)

DEFAULT_THREADS = torch.get_num_threads()
"""PyTorch's own choice: OMP_NUM_THREADS, or the physical cores."""

SOURCE = "source.yaml"
"""The configuration with its interpolations: a resumed run starts from it, so that overrides reach every use."""


def run_job(cfg: DictConfig) -> float | None:
    """The task of train.py: a job of a sweep is a process of its own; alone, a failure ends in one line."""
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:  # under another launcher than our own, which calls train.py itself
        job = Job.of(hydra.job.num, hydra.overrides.task, hydra.runtime.output_dir, cfg)
        return run_to_end(job, cfg.num_threads, cfg.objective)
    if status := one_line_errors(partial(run, cfg)):
        discard_if_empty(hydra.runtime.output_dir)  # of a run refused before it wrote anything
        sys.exit(status)
    return None


def configure(cfg: DictConfig) -> DictConfig:
    """The configuration to run: the given one, or the resumed run's own with value overrides applied."""
    folder = HydraConfig.get().runtime.output_dir
    if not is_later_rank():
        claim(folder)
    if not cfg.resume:
        if torch.distributed.is_torchelastic_launched() and not cfg.run_dir:
            raise ValueError("run_dir=PATH is needed under torchrun: its processes must write to one folder")
        if (Path(folder) / CONFIG).exists() and not is_later_rank():
            raise ValueError(
                f"run_dir={folder} holds a run already; choose another, or continue it with resume={folder}"
            )
        cfg.run_dir, cfg.name = folder, str(cfg.name)
        cfg.tags = cfg.tags or default_tags(HydraConfig.get().runtime.choices, cfg.loss.get("delta"))
        return cfg
    saved = OmegaConf.load(Path(cfg.resume) / SOURCE)
    assert isinstance(saved, DictConfig)
    OmegaConf.set_struct(saved, True)
    task = [item for item in HydraConfig.get().overrides.task if not item.startswith("resume=")]
    overrides = [item.lstrip("+") for item in task]
    for item in overrides:
        key = item.split("=", 1)[0]
        if OmegaConf.is_dict(OmegaConf.select(saved, key)):
            raise ValueError(f"{item}: a resumed run keeps its {key}; only single values can be overridden")
    known = [item for item in task if not item.startswith("+")]
    merged = OmegaConf.merge(saved, OmegaConf.from_dotlist(known), {"run_dir": folder})
    # `++` is for keys that the run has and the defaults lack, or the other way round.
    OmegaConf.set_struct(merged, False)
    merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([item for item in overrides if item not in known]))
    assert isinstance(merged, DictConfig)
    OmegaConf.set_struct(merged, True)  # a key it lacks is an error, not None
    if merged.num_iterations != saved.num_iterations:
        print(
            f"num_iterations {saved.num_iterations} -> {merged.num_iterations}: schedules over the run, such as "
            "learning_rate=cosine, now follow the new length, so the numbers differ from those of a run never stopped"
        )
    return merged


def build(cfg: DictConfig) -> tuple[Policy, PromptData, Evaluator]:
    """The policy, its training prompts and its evaluator; rules between components are checked before weights load."""
    torch.set_num_threads(cfg.num_threads or DEFAULT_THREADS)
    algorithm: Algorithm = instantiate(cfg.algorithm)
    plan: BatchPlan = instantiate(cfg.batch)
    adapter, ema = instantiate(cfg.tuning), instantiate(cfg.ema)
    data: PromptData = instantiate(cfg.data)
    evaluator: Evaluator = instantiate(cfg.evaluation)
    check_guidance(cfg)
    check_deadlines(cfg)
    check_trainer(cfg)
    max_grad_norm = norm_limit(cfg.max_grad_norm)
    if algorithm.state() and plan.updates_per_iteration * plan.inner_epochs < 3:
        raise ValueError(
            "loss.delta=auto needs batch.updates_per_iteration times batch.inner_epochs above 2: an iteration's first "
            "update is never masked, so it alone makes the second one's KL"
        )
    reward = RewardModule(reward=instantiate(cfg.reward), max_missing=cfg.max_missing)
    model = instantiate(cfg.model)
    policy = (ForwardPolicy if isinstance(algorithm.loss, NFT) else Policy)(
        model=model,
        adapter=adapter,
        reward=reward,
        reference=ReferenceModule(model=model, guidance_scale=algorithm.penalty.guidance_scale),
        algorithm=algorithm,
        plan=plan,
        optimizer=instantiate(cfg.optimizer),
        learning_rate=instantiate(cfg.learning_rate),
        ema=ema,
        max_grad_norm=max_grad_norm,
        gate_tolerance=cfg.gate_tolerance,
        seed=cfg.seed,
    )
    instantiate(cfg.backend).apply(model)
    policy.embed = instantiate(cfg.embeddings)(model, data.prompts + evaluator.prompts)
    return policy, data, evaluator


def run(cfg: DictConfig) -> None:
    """One training run in its own folder, from the start or from the newest checkpoint of `resume`."""
    cfg = configure(cfg)
    quieten()
    folder = Path(cfg.run_dir)
    record = RunRecord(folder=str(folder))
    policy, data, evaluator = build(cfg)
    stop = Stop()
    saver = Checkpoint(record=record, stop=stop, folder=str(folder), **cfg.checkpoint)
    data.start_iteration = saver.resume_from(policy)
    if data.start_iteration > len(data.iterations):
        raise ValueError(f"num_iterations={len(data.iterations)}: the run has finished {data.start_iteration} already")
    if not is_later_rank():
        write_config(cfg, folder)
        point_latest_at(folder)
    viewer = Evaluate(evaluator=evaluator, record=record, folder=str(folder), **cfg.viewing)
    print(f"run directory: {folder}\nbatch plan:\n{policy.describe_plan()}")
    if data.start_iteration:
        print(f"  resuming after iteration       {data.start_iteration}")
    loggers: list[Logger] = [instantiate(logger) for logger in (cfg.logger or {}).values()]
    callbacks = [stop, *map(instantiate, (cfg.callbacks or {}).values()), viewer, record, saver]
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False)
    _prepare(loggers, cfg)
    status = "failed"
    try:
        trainer.fit(policy, datamodule=data)
        is_whole = policy.num_iterations == len(data.iterations)
        if is_whole:
            saver.export(trainer, policy)
        status = "finished" if is_whole else "stopped"
    except SystemExit:  # how Lightning ends on an interrupt
        status = "stopped"
    except TooManyMissingRewards as error:
        remedy = f"{saver.newest()}; once the scorer works, continue with: python train.py resume={folder}"
        raise TooManyMissingRewards(f"{error}; {remedy}") from error
    finally:
        if trainer.is_global_zero:
            record.write_summary(policy, status)
        _close(loggers, status)
    if status == "finished":
        print(f"finished: {folder}/summary.json, images/, {lora.folder_name(policy.transformer)}/")
    elif not is_later_rank():  # whose failure would have Lightning kill the first one, which may still be writing
        print(f"\nstopped; {saver.newest()}. Continue with: python train.py resume={folder}")
        raise KeyboardInterrupt


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write the configuration as it is, then resolved: by the second a run's folder is known."""
    for name, is_resolved in ((SOURCE, False), (CONFIG, True)):
        write_whole(folder / name, OmegaConf.to_yaml(cfg, resolve=is_resolved))


def check_guidance(cfg: DictConfig) -> None:
    """Guidance needs a model that encodes negative prompts. Raises ValueError naming both keys."""
    scales = {
        "rollout.guidance_scale": cfg.rollout.guidance_scale,
        "evaluation.guidance_scale": cfg.evaluation.guidance_scale,
        "penalty.guidance_scale": cfg.penalty.guidance_scale,
    }
    for name, scale in scales.items():
        if scale != 1 and not cfg.model.has_guidance:
            raise ValueError(f"{name}={scale} needs model.has_guidance=true; 1.0 means no guidance")


def check_deadlines(cfg: DictConfig) -> None:
    """Other processes wait in a collective for the one whose scores are late. Raises ValueError naming both keys.

    Until its circuit opens, a service that hangs may cost `open_after` calls, each up to its deadline; those of a
    mixture are asked one after the other.
    """
    strategy = cfg.trainer.get("strategy")
    minutes = strategy.get("timeout_minutes") if OmegaConf.is_dict(strategy) else None
    if minutes is None:
        return
    limit = 60 * minutes
    clients = dict(_clients(OmegaConf.to_container(cfg.reward, resolve=True), "reward"))
    if sum(client["open_after"] * client["deadline"] for client in clients.values()) >= limit:
        each = [
            f"{name}.deadline={c['deadline']:g} seconds x open_after={c['open_after']}" for name, c in clients.items()
        ]
        raise ValueError(
            f"{' + '.join(each)} must stay below trainer.strategy.timeout_minutes={minutes:g} ({limit:g} seconds), "
            "after which the other processes give up: lower the former, or raise the latter"
        )


def _clients(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings below `node` of what asks a service, with their keys."""
    if isinstance(node, dict):
        if "deadline" in node:
            yield name, node
        for key, child in node.items():
            yield from _clients(child, f"{name}.{key}")


def check_trainer(cfg: DictConfig) -> None:
    """How a run may be spread and rounded. Raises ValueError naming both keys."""
    if str(cfg.trainer.get("precision")) not in ("None", "32", "32-true"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision} rounds the trained weights, or keeps casts of them that later "
            "updates of an iteration do not see; take model.dtype=bfloat16, whose LoRA stays float32"
        )
    if cfg.model.dtype == "float16":
        raise ValueError(
            "model.dtype=float16 cannot be trained: gradients of mean-reduced log-probabilities are below its smallest "
            "number; take bfloat16"
        )
    if OmegaConf.select(cfg, "trainer.strategy._target_") == "flowrl.modules.parallel.parts":
        if cfg.tuning._target_ != "flowrl.models.full.Full":
            raise ValueError("trainer=fsdp is for tuning=full, whose weights it divides; for LoRA take trainer=ddp")
        devices, num_nodes = cfg.trainer.devices, cfg.trainer.num_nodes
        # How many `auto` and -1 are is known later.
        if devices not in ("auto", -1) and num_ranks(devices) * num_nodes != cfg.batch.num_processes:
            raise ValueError(
                f"trainer.devices={devices} and trainer.num_nodes={num_nodes} with trainer=fsdp need "
                f"batch.num_processes={num_ranks(devices) * num_nodes}"
            )
        if cfg.backend.compile:
            raise ValueError("trainer=fsdp does not go with backend.compile=true; set it to false")


def _prepare(loggers: list[Logger], cfg: DictConfig) -> None:
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    for logger in loggers:
        logger.log_hyperparams({str(key): value for key, value in resolved.items()})
        if isinstance(logger, WandbLogger):
            # Our own axis: W&B's step would drop values logged out of order.
            logger.experiment.define_metric("*", step_metric="iteration")


def _close(loggers: list[Logger], status: str) -> None:
    for logger in loggers:
        logger.finalize("success" if status == "finished" else "failed")
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def quieten() -> None:
    """Silence advice about Lightning's defaults that does not concern this loop, and later ranks' standard output."""
    if is_later_rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    advice = ("available:", "litlogger", "litmodels", "`Trainer.fit` stopped", "Detected Keyb")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).addFilter(lambda record: not any(word in record.getMessage() for word in advice))
    for message in (
        ".*does not have many workers.*",
        ".*module\\(s\\) in eval mode.*",
        ".*LeafSpec.*",
        ".*ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message)
