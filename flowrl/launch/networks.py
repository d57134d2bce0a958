"""The networks that are trained are compared with the tuning and with how they are spread over
processes, before their weights load.
"""

from __future__ import annotations

from omegaconf import DictConfig
from torch import nn

from flowrl.launch.checks import check_division
from flowrl.models.experts import networks_of
from flowrl.models.outline import outline
from flowrl.models.quantization import quantize
from flowrl.models.weights import DTYPES
from flowrl.tuning.protocol import TuningRecipe


def check_networks(cfg: DictConfig, recipe: TuningRecipe) -> None:
    """Check, without weights, that the tuning suits the configured model's layers, and that they
    can be divided where they are to be.

    Raises UserError naming the key, and where the model is not to be had.
    """
    network = outline(cfg.model)
    if network is None:
        return
    # Not by its own method, which in diffusers warns of every cast.
    network = nn.Module.to(network, DTYPES[cfg.model.dtype])
    quantization = cfg.model.get("quantization")
    if quantization is not None:
        for part in networks_of(network).values():
            quantize(part, quantization)
    recipe.check_layers(network)
    check_division(cfg, network)
