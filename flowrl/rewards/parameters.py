"""The networks that scorers hold, and how many parameters they have: for plans, which load none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowrl.models.weights import DTYPES

KEYS: Mapping[str, str] = {
    "flowrl.rewards.aesthetic.Aesthetic": "pretrained",
    "flowrl.rewards.clip_score.CLIPScore": "pretrained",
    "flowrl.rewards.colours.Colours": "pretrained",
    "flowrl.rewards.hpsv2.HPSv2": "architecture",
    "flowrl.rewards.looks.CLIPFeatures": "pretrained",
    "flowrl.rewards.image_reward.ImageReward": "weights",
    "flowrl.rewards.mask2former.Mask2Former": "pretrained",
    "flowrl.rewards.owlv2.OWLv2": "pretrained",
    "flowrl.rewards.shapes_proxy.ShapesProxy": "pretrained",
}
"""The classes that hold a network, and the key that names it. All others of FlowRL's compute by
rules, on the CPU, or ask a server.
"""

# All are counted, on the meta device: CLIP, OWLv2 and Mask2Former of transformers at the released
# sizes, open_clip's ViT-H-14, and BLIP's towers as `image_reward` builds them; ShapesProxy in its
# file. The published figures of OWLv2 and Mask2Former, 437 and 68.7 million, are these rounded. The
# head of the aesthetic predictor is left out: another .9 million.
PARAMETERS: Mapping[str, int] = {
    "openai/clip-vit-large-patch14": 427_616_513,
    "yuvalkirstain/PickScore_v1": 986_109_441,
    "ViT-H-14": 986_109_441,
    "google/owlv2-large-patch14-ensemble": 437_610_760,
    "facebook/mask2former-swin-small-coco-instance": 68_741_083,
    "flowrl.rewards.image_reward.ImageReward": 446_206_689,
    "flowrl.rewards.shapes_proxy.ShapesProxy": 183_617,
}
"""Parameters by a network's name, or by the class that fixes its sizes."""


@dataclass(frozen=True)
class ScorerNetwork:
    """A network of a scorer's, by its name or by the class of a private scorer, and the dtype that
    it is loaded in; `num_parameters` is None where nothing is known of it.
    """

    name: str
    dtype: str
    num_parameters: int | None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its weights, as far as they are known."""
        return (self.num_parameters or 0) * DTYPES[self.dtype].itemsize


def networks_of_reward(reward: Mapping[str, Any]) -> list[ScorerNetwork]:
    """List the networks that a reward's configuration loads, in its order, those of rewards inside
    of it included; a network that two of them name is there twice.

    A class that is none of FlowRL's is listed too, since it may hold some.
    """
    networks = []
    for node in _nodes(reward):
        target = str(node["_target_"])
        if target in KEYS:
            name = str(node.get(KEYS[target]))
            count = PARAMETERS.get(name, PARAMETERS.get(target))
            # A scorer without the key computes in float32.
            networks.append(ScorerNetwork(name, str(node.get("dtype", "float32")), count))
        elif not target.startswith("flowrl."):
            networks.append(ScorerNetwork(target, "float32", None))
    return networks


def _nodes(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the nodes with a target, from the outermost inwards."""
    children: list[Any] = []
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield value
        children = list(value.values())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        children = list(value)
    for child in children:
        yield from _nodes(child)
