"""Prompts are compared with what the configured model does with pictures, before weights load."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.utils import get_object
from omegaconf import DictConfig

from flowrl.models.loading import META
from flowrl.models.pictured import check_config
from flowrl.types import Prompt


def check_model_of_prompts(cfg: DictConfig, prompts: Sequence[Prompt]) -> None:
    """Compare prompts with what the configured model does with pictures.

    Raises UserError, in one line, as `flowrl.models.pictured.check_use` does.
    """
    pretrained = str(cfg.model.get("pretrained") or META)
    # Plans load no weights and draw no prompt.
    if prompts and not pretrained.startswith(META):
        check_config(get_object(cfg.model._target_), cfg.model, prompts)
