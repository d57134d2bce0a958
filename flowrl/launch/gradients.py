"""A loss that takes the reward's own gradient is compared with the reward, the base model and how
the run is spread over processes, before weights load where that is known then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from flowrl.errors import UserError
from flowrl.launch.checks import divides_weights
from flowrl.launch.signatures import import_target
from flowrl.losses.protocol import Loss
from flowrl.models.experts import networks_of
from flowrl.models.outline import outline
from flowrl.rewards.differentiable import no_gradient
from flowrl.rewards.mixture import Mixture


def check_gradients(cfg: DictConfig, loss: Loss) -> None:
    """Check, without weights, that gradients reach the trained weights through the reward, for a
    loss that takes them. Raises UserError naming the key.
    """
    if loss.kind != "direct":
        return
    reward: Any = OmegaConf.to_container(cfg.reward, resolve=True)
    for name, kind in _scorers("reward", reward):
        # What a function makes is known once it is made.
        if isinstance(kind, type) and not hasattr(kind, "score_with_graph"):
            raise UserError(no_gradient(f"{kind.__name__} ({name})"))
        if getattr(kind, "whole_groups", False):
            raise UserError(
                f"{name}: {kind.__name__} compares the images of a prompt, which loss={loss.name} "
                "does not show together; choose another reward"
            )
    if divides_weights(cfg):
        raise UserError(
            f"trainer=fsdp does not go with loss={loss.name}, which passes through the network "
            "several times in one graph; take trainer=ddp"
        )
    network = outline(cfg.model)
    if network is not None:
        check_single(loss, network)


def check_single(loss: Loss, network: nn.Module) -> None:
    """Check that the steps which have a gradient are those of the one network that there is. Raises
    UserError naming the key.
    """
    count = len(networks_of(network))
    if loss.kind == "direct" and count > 1:
        raise UserError(
            f"loss={loss.name} trains the network of the last steps alone, and the pipeline has "
            f"{count}; choose another loss"
        )


def _scorers(name: str, node: Mapping[str, Any]) -> Iterator[tuple[str, type[Any]]]:
    """Yield the keys and classes of a reward, or of those in a mixture that are trained on."""
    kind = import_target(name, node["_target_"])
    if kind is not Mixture:
        yield name, kind
        return
    for key, child in node["rewards"].items():
        if node["weights"].get(key, 1.0) != 0:
            yield from _scorers(f"{name}.rewards.{key}", child)
