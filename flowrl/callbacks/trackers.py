"""Experiment trackers that need a decision: W&B online where it can be reached with a key, offline
by itself if not.
"""

from __future__ import annotations

import logging
import os
import shlex
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from lightning.pytorch.loggers import Logger, WandbLogger

from flowrl.errors import UserError
from flowrl.parallel.strategies import is_later_rank
from flowrl.values.bounds import ProjectName, Tag, Text

log = logging.getLogger(__name__)

ID_FILE = "wandb_id"
REACH_SECONDS = 4.0
"""The time for W&B's server to give any answer; then its library checks the key, within ten
seconds.
"""


Mode = Literal["online", "offline", "disabled"]


@dataclass(frozen=True)
class Destination:
    """The place where W&B's runs go. An unasked `offline` has a reason, which is a fault where
    `is_fault` says so.
    """

    mode: Mode
    reason: str = ""
    is_fault: bool = False


def wandb_logger(
    *,
    project: ProjectName,
    name: Text,
    group: Text | None,
    job_type: Text,
    tags: Sequence[Tag] | None,
    folder: Text,
    entity: Text | None = None,
    mode: Mode | None = None,
    notes: Text | None = None,
    log_model: bool = False,
) -> WandbLogger:
    """Make a W&B run whose id is kept in the run's folder, so that a resumed run continues it.

    Without a `group` it is the sweep's, which W&B reads from WANDB_RUN_GROUP. Where it goes is
    decided here, before weights load; `start` opens it. With `log_model`, `finish` uploads the
    weights that the run exported. The last keys have defaults for runs of earlier versions, whose
    configuration lacks them. Raises UserError for settings that W&B itself refuses, and where
    `mode` asks for a run online and there is no key.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    # Later ranks open no run.
    place = Destination("disabled") if is_later_rank() else destination(mode)
    if place.is_fault:
        log.warning("W&B: %s; the run is kept offline", place.reason)
    id_file = Path(folder) / ID_FILE
    logger = WandbLogger(
        project=project,
        name=name,
        group=group,
        job_type=job_type,
        tags=list(tags or ()),
        save_dir=folder,
        id=id_file.read_text() if id_file.is_file() else uuid.uuid4().hex[:8],
        resume="allow",
        entity=entity,
        notes=notes,
        # None leaves a mode that W&B was set to, such as shared, as it is.
        mode=mode if place.mode == "online" else place.mode,
        log_model=log_model,
    )
    # Lightning hands it on though W&B no longer takes it, and warns.
    logger._wandb_init.pop("anonymous", None)
    return logger


def destination(mode: Mode | None = None) -> Destination:
    """Ask W&B's library where it would send a run: environment, netrc and settings files as it
    reads them; a `mode` comes before theirs.

    Raises UserError where it refuses its settings, and where `online` is asked for without a key.
    """
    import wandb
    from wandb.sdk.lib import wbauth

    try:
        settings = wandb.setup().settings
        host = wbauth.HostUrl(settings.base_url, app_url=settings.app_url)
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(
            f"W&B refuses its settings: {_one_line(error)}; correct them, or take logger=none"
        ) from error
    wanted = mode or settings.mode
    if wanted == "disabled":
        return Destination("disabled")
    if wanted in ("offline", "dryrun"):
        return Destination("offline", f"asked for by its mode {wanted}")
    try:
        key = wbauth.authenticate_session(
            host=host, source="flowrl", prompt=False, update_session=False
        )
        if key is None:
            reason = f"no key for {host} (`wandb login` stores one)"
            if mode == "online":
                raise UserError(f"logger.wandb.mode=online: {reason}; or take mode=offline")
            return Destination("offline", reason)
        if not is_reachable(host.url):
            return Destination("offline", f"{host} cannot be reached", is_fault=True)
        key.verify()
    except wandb.errors.Error as error:
        return Destination("offline", _one_line(error), is_fault=True)
    return Destination("online")


def is_reachable(url: str, seconds: float = REACH_SECONDS) -> bool:
    """Tell whether a server gives any answer, through the environment's proxy, within `seconds`."""
    answers: list[int] = []

    def ask() -> None:
        try:
            # Only whether it answers; W&B's library has certificates of its own, and no key is sent
            # here.
            response = httpx.get(url, timeout=seconds, verify=False)
            answers.append(response.status_code)
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return

    # Names are looked up without a time limit, so a thread waits for that.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def start(logger: WandbLogger, folder: str | Path) -> None:
    """Open W&B's run, offline where that fails, and say where it goes; its id is kept in
    `folder`.
    """
    import wandb

    if is_later_rank():
        return
    try:
        run = logger.experiment
    except wandb.errors.Error as error:
        log.warning("W&B: %s; the run is kept offline", _one_line(error))
        logger._wandb_init["mode"] = "offline"
        run = logger.experiment
    (Path(folder) / ID_FILE).write_text(run.id)
    # Our own axis: W&B's step would drop values logged out of order.
    run.define_metric("*", step_metric="iteration")
    if run.disabled:
        return
    if run.offline:
        place = Path(run.dir).parent
        if place.is_relative_to(Path.cwd()):
            place = place.relative_to(Path.cwd())
        sync = shlex.join(["wandb", "sync", str(place)])
        print(f"W&B: offline; send it with:\n  {sync}")
    else:
        print(f"W&B: {run.url}")


def finish(logger: WandbLogger, weights: Path | None = None) -> None:
    """Close W&B's run, which takes the folder `weights` along where it was asked for; where its
    service has died, that is told, and the run of FlowRL ends as it would have.
    """
    import wandb

    try:
        run = logger.experiment
        if logger._log_model and weights is not None and not is_later_rank():
            artifact = wandb.Artifact(f"{run.id}-{weights.name}", type="model")
            artifact.add_dir(str(weights))
            run.log_artifact(artifact)
        run.finish()
    except Exception as error:  # of any kind: its library does not say which
        log.warning("W&B could not close its run (%s: %s)", type(error).__name__, _one_line(error))


def default_tags(choices: Mapping[str, str], delta: object) -> list[str]:
    """Return tags that tell runs apart, from the options chosen and the loss's threshold, if it has
    one.
    """
    tags = [f"{group}={choices[group]}" for group in ("sampler", "loss", "model", "reward")]
    if delta is not None:
        tags.append(f"delta={delta}")
    return tags


def alert(
    loggers: Sequence[Logger], title: str, text: str, *, level: Literal["WARN", "ERROR"]
) -> None:
    """Send a W&B alert, as mail or in Slack, by its user's settings; other trackers have none."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.alert(title=title, text=text, level=level)


def log_clips(loggers: Sequence[Logger], path: Path) -> None:
    """Send moving pictures to W&B, as the GIF that they are, which it does not have to encode;
    other trackers have the strips.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_video("clips", [str(path)])
