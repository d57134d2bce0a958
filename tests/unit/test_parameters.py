"""What a plan knows of the networks that rewards load."""

import inspect
import pkgutil
from importlib import import_module

import pytest
import torch
from omegaconf import OmegaConf
from runs import composed
from torch import nn
from transformers import CLIPConfig, CLIPModel

import flowrl.rewards
from flowrl.rewards.parameters import KEYS, PARAMETERS, ScorerNetwork, networks_of_reward

CLIP_L = ScorerNetwork("openai/clip-vit-large-patch14", "float32", 427_616_513)
PICKSCORE = ScorerNetwork("yuvalkirstain/PickScore_v1", "float32", 986_109_441)
HPS = ScorerNetwork("ViT-H-14", "float32", 986_109_441)


def networks_of(reward):
    """The networks of one of the shipped rewards."""
    cfg = composed(f"reward={reward}")
    return networks_of_reward(OmegaConf.to_container(cfg.reward, resolve=True))


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("shapes", []),
        ("jpeg_compressibility", []),
        ("remote", []),
        ("ocr", []),
        ("edit_judge", []),
        ("clip_score", [CLIP_L]),
        ("aesthetic", [CLIP_L]),
        ("pickscore_ocr", [PICKSCORE]),
        ("geneval2_mixture", [PICKSCORE, CLIP_L, HPS]),
    ],
)
def test_networks_of_a_reward(reward, expected):
    """In a mixture those of all its rewards, a judge behind a server not among them. Mutation: look
    at the outermost alone.
    """
    assert networks_of(reward) == expected


@pytest.mark.parametrize("reward", ["geneval", "geneval_mask2former"])
def test_a_detector_and_what_names_colours_are_networks(reward):
    """Mutation: look into rewards of rewards alone."""
    networks = {network.name: network.num_parameters for network in networks_of(reward)}
    assert networks.pop(CLIP_L.name) == CLIP_L.num_parameters
    [(name, count)] = networks.items()
    assert count == PARAMETERS[name] > 10**7


CLIPS = {
    CLIP_L.name: ((768, 3072, 12), (1024, 4096, 24, 16), 768),
    PICKSCORE.name: ((1024, 4096, 24), (1280, 5120, 32, 16), 1024),
}
"""Width, inner width and layers of the text tower and, with its heads, of the image tower; the
width of features.
"""


@pytest.mark.parametrize("name", CLIPS)
def test_parameters_are_those_of_the_network(name):
    """Built at the published sizes, without memory. Mutation: a digit."""
    text, vision, width = CLIPS[name]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = CLIPConfig(
        projection_dim=width,
        text_config=dict(zip(keys, text, strict=False)),
        vision_config=dict(zip(keys, vision, strict=True)) | {"patch_size": 14},
    )
    with torch.device("meta"):
        network = CLIPModel(config)
    assert sum(weight.numel() for weight in network.parameters()) == PARAMETERS[name]


def test_routed_rewards_and_lists_are_walked():
    """Two bytes a parameter in bfloat16, four in float32. Mutation: pass over lists, or over the
    dtype.
    """
    clip = {"_target_": "flowrl.rewards.clip_score.CLIPScore", "dtype": "bfloat16"}
    clip["pretrained"] = CLIP_L.name
    routed = {"_target_": "flowrl.rewards.routed.Routed", "reward": clip, "key": "family"}
    [network] = networks_of_reward({"_target_": "flowrl.rewards.mixture.Mixture", "all": [routed]})
    assert network.num_bytes == 2 * 427_616_513
    assert CLIP_L.num_bytes == 4 * 427_616_513


def test_what_is_not_known_has_no_size():
    """A private class, with the known ones below it, and weights of one's own. Mutation: pass over
    what is not known.
    """
    own = {"_target_": "flowrl.rewards.clip_score.CLIPScore", "pretrained": "/own"}
    networks = networks_of_reward({"_target_": "private.Reward", "inner": own})
    unknown = [ScorerNetwork(name, "float32", None) for name in ("private.Reward", "/own")]
    assert networks == unknown
    assert networks[0].num_bytes == 0


def test_each_class_with_weights_is_known():
    """They are modules, as are those that hold no network but others'. Mutation: forget one."""
    names = set()
    for info in pkgutil.iter_modules(flowrl.rewards.__path__):
        module = import_module(f"flowrl.rewards.{info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                names.add(f"{kind.__module__}.{kind.__name__}")
    holders = ("clip.CLIP", "geneval.GenEval", "mixture.Mixture", "routed.Routed")
    holders += ("looks.Statistics", "votes.Votes")
    assert names - {f"flowrl.rewards.{name}" for name in holders} == set(KEYS)
