"""The configuration that a run starts from: the composed one, or a resumed run's own with overrides applied."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.launch import trust
from flowrl.launch.command_line import resume_command
from flowrl.launch.composed import freeze
from flowrl.launch.start import refuse_other_start, take_from_file
from flowrl.launch.trust import check_config, project_folders
from flowrl.modules.parallel import is_later_rank
from flowrl.runs.files import CONFIG, SOURCE, write_whole
from flowrl.runs.folder import claim
from flowrl.trackers import default_tags


def configure(cfg: DictConfig) -> DictConfig:
    """The configuration to run: the given one, or the resumed run's own with value overrides applied."""
    folder = HydraConfig.get().runtime.output_dir
    if not is_later_rank():
        claim(folder)
    if not cfg.resume:
        if torch.distributed.is_torchelastic_launched() and not cfg.run_dir:
            raise UserError("run_dir=PATH is needed under torchrun: its processes must write to one folder")
        if (Path(folder) / CONFIG).exists() and not is_later_rank():
            raise UserError(
                f"run_dir={folder} holds a run already; choose another, or continue it with: {resume_command(folder)}"
            )
        cfg.run_dir = folder
        freeze(cfg)  # a resumed run must not take the choices and the time of the launch that resumes it
        take_from_file(cfg, HydraConfig.get().overrides.task)
        cfg.tags = cfg.tags or default_tags(HydraConfig.get().runtime.choices, cfg.loss.get("delta"))
        return cfg
    saved = OmegaConf.load(Path(cfg.resume) / SOURCE)
    assert isinstance(saved, DictConfig)
    project = project_folders(HydraConfig.get(), leaving_out=Path(cfg.resume))
    check_config(saved, Path(cfg.resume), is_trusted=bool(cfg.get(trust.KEY)), conf=project)
    OmegaConf.set_struct(saved, True)
    task = [item for item in HydraConfig.get().overrides.task if item.split("=")[0] not in ("resume", trust.KEY)]
    refuse_other_start(task)
    overrides = [item.lstrip("+") for item in task]
    for item in overrides:
        key = item.split("=", 1)[0]
        if OmegaConf.is_dict(OmegaConf.select(saved, key)):
            raise UserError(f"{item}: a resumed run keeps its {key}; only single values can be overridden")
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


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write the configuration as it is, then resolved: by the second a run's folder is known."""
    for name, is_resolved in ((SOURCE, False), (CONFIG, True)):
        write_whole(folder / name, OmegaConf.to_yaml(cfg, resolve=is_resolved))
