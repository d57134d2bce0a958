"""Count the parameters of published models and of the LoRA that their options train.

    python scripts/count_parameters.py                     # every option of conf/model
    python scripts/count_parameters.py model=qwen_image    # one, with its LoRA's layers
    python scripts/count_parameters.py model=wan21_t2v_14b lora.rank=16

The networks are built on PyTorch's meta device, from the released configurations. The memory that
is printed is what a GPU holds all along: the frozen weights in the option's dtype, and the LoRA in
float32 with its gradients, Adam's two averages and the EMA. The autoencoder, activations and
samples come on top, which `scripts/plan_memory.py` counts.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from flowrl.errors import UserError
from flowrl.launch.compose import CONF, compose
from flowrl.models.architectures import ARCHITECTURES, on_meta
from flowrl.models.experts import as_one
from flowrl.models.published import PUBLISHED
from flowrl.models.weights import DTYPES
from flowrl.tuning.lora import LoRA
from flowrl.values.units import GIB

FLOAT32 = 4
COPIES = 5
"""Of the LoRA's weights: themselves, gradients, two averages of Adam's, and the EMA."""


@dataclass(frozen=True)
class Count:
    """The size of a published model: its transformer's parameters, the layers that the LoRA adapts,
    in the network's order, the LoRA's rank and parameters, and the bytes that all of it takes.
    """

    pretrained: str
    parameters: int
    rank: int
    layers: list[str]
    lora: int
    num_bytes: int

    def describe(self) -> str:
        """Say all in a line."""
        return (
            f"{self.pretrained}: {self.parameters:,} parameters; LoRA of rank {self.rank} on "
            f"{len(self.layers)} layers, {self.lora:,} parameters; {self.num_bytes / GIB:.1f} GiB"
        )

    def kinds(self) -> list[str]:
        """Return the kinds of layers, their blocks' numbers left out, and how many there are."""
        counts = Counter(re.sub(r"\.\d+\.", ".*.", layer, count=1) for layer in self.layers)
        return [f"{number:>5} x {kind}" for kind, number in counts.items()]


def network_of(pretrained: str) -> nn.Module:
    """Make the transformer of a published model, or all that it has, on the meta device.

    Raises UserError for one whose configuration is not known here.
    """
    if pretrained in PUBLISHED:
        return as_one(PUBLISHED[pretrained].networks())
    if pretrained in ARCHITECTURES:
        return on_meta(pretrained, torch.float32)
    raise UserError(
        f"model.pretrained={pretrained}: no configuration of it is known here; known are "
        f"{', '.join((*ARCHITECTURES, *PUBLISHED))}"
    )


def count(overrides: Sequence[str]) -> Count:
    """Count what a configuration's model and LoRA hold.

    Raises UserError where it trains no LoRA.
    """
    cfg: Any = compose(["name=count", *overrides])
    recipe = instantiate(cfg.tuning)
    if not isinstance(recipe, LoRA) or recipe.rank is None:
        raise UserError(
            "tuning: parameters are counted of a LoRA that begins anew; set tuning=lora"
        )
    network = network_of(cfg.model.pretrained)
    parameters = sum(value.numel() for value in network.parameters())
    recipe.check_layers(network)
    with torch.device("meta"):
        trained = recipe.attach(network, seed=0).parameters()
    layers = [name.split(".lora_A.")[0] for name in trained if ".lora_A." in name]
    lora = sum(value.numel() for value in trained.values())
    num_bytes = parameters * DTYPES[cfg.model.dtype].itemsize + COPIES * lora * FLOAT32
    return Count(cfg.model.pretrained, parameters, recipe.rank, layers, lora, num_bytes)


def options() -> list[str]:
    """Return the options of conf/model whose architecture is published."""
    names = sorted(path.stem for path in CONF.glob("model/*.yaml"))
    return [name for name in names if name not in ("derived", "shapes")]


def main() -> None:
    """Count what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="configuration overrides, as for train.py")
    args = parser.parse_args()
    if args.overrides:
        counted = count(args.overrides)
        print("\n".join([counted.describe(), *counted.kinds()]))
        return
    for name in options():
        print(f"model={name}: {count([f'model={name}']).describe()}", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
