"""From a composed configuration to a finished run: resume, checks, instantiation, fit, summary.

The only module of the package that knows Hydra. User mistakes end in one line on standard error and exit status 1.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.algorithm import Algorithm
from flowrl.batch_plan import BatchPlan
from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.evaluate import Evaluate
from flowrl.callbacks.record import RunRecord, write_whole
from flowrl.data import PromptData
from flowrl.evaluation import Evaluator
from flowrl.losses.nft import NFT
from flowrl.modules.forward import ForwardPolicy
from flowrl.modules.gate import GateFailed
from flowrl.modules.policy import Policy
from flowrl.modules.reference import ReferenceModule
from flowrl.modules.reward import RewardModule, TooManyMissingRewards

log = logging.getLogger(__name__)

DEFAULT_THREADS = torch.get_num_threads()
"""PyTorch's own choice: OMP_NUM_THREADS, or the physical cores."""

CONFIG = "config.yaml"
SOURCE = "source.yaml"
"""The configuration with its interpolations: a resumed run starts from it, so that overrides reach every use."""
USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError, GateFailed, TooManyMissingRewards)


def register_resolvers() -> None:
    """The resolvers that YAML files use.

    `${run_folder:RESUME,RUN_DIR,NEW}` is the run to resume, the folder asked for, or a new one;
    `${image_tokens:RESOLUTION,PIXELS}` the length of a square image's sequence of tokens of PIXELS a side.
    """
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)
    OmegaConf.register_new_resolver("image_tokens", lambda side, pixels: (side // pixels) ** 2, replace=True)


def _run_folder(resume: str | None, run_dir: str | None, new: str) -> str:
    if resume and not (Path(resume) / CONFIG).is_file():
        raise ValueError(f"resume={resume}: no {CONFIG} there; give the folder of an earlier run")
    # Resolved, since `outputs/latest` is a link that this very run will move.
    return str(Path(resume).resolve()) if resume else run_dir or new


def one_line_errors(main: Callable[[], Any]) -> int:
    """Call `main`; 0, or 1 after printing a user's mistake as one line. Other exceptions keep their traceback."""
    # Hydra then raises instead of printing its own multi-line report.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        main()
    except USER_ERRORS as error:
        if os.environ.get("FLOWRL_TRACEBACK"):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_job(cfg: DictConfig) -> None:
    """The task of train.py: in a sweep a failure is left to Hydra, alone it ends the process with one line."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        run(cfg)
    elif status := one_line_errors(partial(run, cfg)):
        sys.exit(status)


def explain(error: BaseException) -> str:
    """The innermost cause of an error, in one line, with a suggestion for a misspelt key or option."""
    place = ""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        key = re.search(r"full_key: (\S+)", str(error))
        place = f"{key[1]}: " if key and not isinstance(error.__cause__, ValueError) else ""
        error = error.__cause__
    text = place + (str(error).strip() or type(error).__name__)
    if match := re.search(
        r"Could not find '([^']+)'.*?Available options in '([^']+)':\n((?:\t\S+\n)*)", text, re.DOTALL
    ):
        group, option = match[1].rsplit("/", 1)
        options = match[3].split()
        return f"{group}={option}: no such option; choose one of {', '.join(options)}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: unknown configuration key{_suggest(match[1])}; see conf/ or `python train.py --cfg job`"
    if isinstance(error.__cause__, OSError):  # logging hides the file it could not open
        error = error.__cause__
    if isinstance(error, OSError) and error.filename:
        remedy = "give a path that exists"
        if not isinstance(error, FileNotFoundError):
            remedy = "make it accessible, or choose another output folder with run_dir=PATH"
        return f"{error.filename}: {error.strerror}; {remedy}"
    if match := re.search(r"__init__\(\) (got an unexpected keyword argument|missing) (.*)", text):
        return f"{match[1]} {match[2]}".replace("keyword argument", "configuration key")
    text = text.removeprefix("ValueError raised while resolving interpolation: ")
    return " ".join(text.split("\n    full_key")[0].split())


def _suggest(key: str) -> str:
    names: set[str] = set()
    for path in (Path(__file__).parents[1] / "conf").rglob("*.yaml"):
        names |= set(re.findall(r"^\s*([a-z_]+):", path.read_text(), re.MULTILINE))
    close = difflib.get_close_matches(key.split(".")[-1], sorted(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def configure(cfg: DictConfig) -> DictConfig:
    """The configuration to run: the given one, or the resumed run's own with value overrides applied."""
    folder = HydraConfig.get().runtime.output_dir
    if not cfg.resume:
        if (Path(folder) / CONFIG).exists():
            raise ValueError(
                f"run_dir={folder} holds a run already; choose another, or continue it with resume={folder}"
            )
        cfg.run_dir, cfg.name = folder, str(cfg.name)
        return cfg
    saved = OmegaConf.load(Path(cfg.resume) / SOURCE)
    assert isinstance(saved, DictConfig)
    OmegaConf.set_struct(saved, True)
    overrides = [item for item in HydraConfig.get().overrides.task if not item.startswith("resume=")]
    for item in overrides:
        key = item.split("=", 1)[0]
        if OmegaConf.is_dict(OmegaConf.select(saved, key)):
            raise ValueError(f"{item}: a resumed run keeps its {key}; only single values can be overridden")
    merged = OmegaConf.merge(saved, OmegaConf.from_dotlist(overrides), {"run_dir": folder})
    assert isinstance(merged, DictConfig)
    return merged


def build(cfg: DictConfig) -> tuple[Policy, PromptData, Evaluator]:
    """The policy, its training prompts and its evaluator; rules between components are checked before weights load."""
    torch.set_num_threads(cfg.num_threads or DEFAULT_THREADS)
    algorithm: Algorithm = instantiate(cfg.algorithm)
    plan: BatchPlan = instantiate(cfg.batch)
    adapter, ema = instantiate(cfg.tuning), instantiate(cfg.ema)
    data: PromptData = instantiate(cfg.data)
    evaluator: Evaluator = instantiate(cfg.evaluation)
    reward = RewardModule(reward=instantiate(cfg.reward), max_missing=cfg.max_missing)
    check_guidance(cfg)
    if algorithm.state() and plan.updates_per_iteration * plan.inner_epochs < 2:
        raise ValueError(
            "loss.delta=auto needs batch.updates_per_iteration or batch.inner_epochs above 1: the first update of an "
            "iteration has a KL of 0"
        )
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
        max_grad_norm=cfg.max_grad_norm,
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
    saver = Checkpoint(record=record, folder=str(folder), **cfg.checkpoint)
    data.start_iteration = saver.resume_from(policy)
    if data.start_iteration > len(data.iterations):
        raise ValueError(f"num_iterations={len(data.iterations)}: the run has finished {data.start_iteration} already")
    for name, is_resolved in ((CONFIG, True), (SOURCE, False)):
        write_whole(folder / name, OmegaConf.to_yaml(cfg, resolve=is_resolved))
    point_latest_at(folder)
    viewer = Evaluate(evaluator=evaluator, record=record, folder=str(folder), **cfg.viewing)
    print(f"run directory: {folder}\nbatch plan:\n{policy.describe_plan()}")
    if data.start_iteration:
        print(f"  resuming after iteration       {data.start_iteration}")
    loggers: list[Logger] = [instantiate(logger) for logger in (cfg.logger or {}).values()]
    callbacks = [*map(instantiate, (cfg.callbacks or {}).values()), viewer, record, saver]
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False)
    for logger in loggers:
        _prepare_logger(logger, cfg)
    status = "failed"
    try:
        trainer.fit(policy, datamodule=data)
        status = "finished" if policy.num_iterations == len(data.iterations) else "stopped"
        if status == "finished" and trainer.is_global_zero:
            saver.export(policy)
    except SystemExit:  # how Lightning ends on an interrupt
        status = "stopped"
    finally:
        if trainer.is_global_zero:
            record.write_summary(policy, status)
        _close(loggers, status)
    if status == "stopped":
        print(f"\nstopped; {saver.newest()}. Continue with: python train.py resume={folder}")
        raise KeyboardInterrupt
    print(f"finished: {folder}/summary.json, images/, lora/")


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


def point_latest_at(folder: Path) -> None:
    """Make `outputs/latest`, beside the runs' folders, a link to this run."""
    root = next((parent for parent in folder.absolute().parents if parent.name == "outputs"), None)
    if root is None:
        return
    link, fresh = root / "latest", root / f".latest.{os.getpid()}"
    fresh.symlink_to(folder.resolve(), target_is_directory=True)
    fresh.replace(link)


def _prepare_logger(logger: Logger, cfg: DictConfig) -> None:
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
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
    """Silence advice about Lightning's defaults that does not concern this loop."""
    advice = ("available:", "litlogger", "litmodels")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).addFilter(lambda record: not any(word in record.getMessage() for word in advice))
    for message in (".*does not have many workers.*", ".*module\\(s\\) in eval mode.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
