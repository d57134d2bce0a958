"""A run in words, from its configuration alone: base model, method with its formula and paper, and
reward, as model cards, LoRA files and lists of runs name them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

EMBEDDED = "embedded:"
"""The beginning of the names of base models that ship with FlowRL."""


@dataclass(frozen=True, slots=True)
class Method:
    """A published method: its name, its objective in the symbols of CONTRIBUTING.md, and its
    source, an arXiv number or words.
    """

    name: str
    formula: str
    source: str


_SURROGATE = "max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))"
_GRPO = Method("Flow-GRPO", f"{_SURROGATE}, r = exp(log_prob - old_log_prob)", "2505.05470")
_CPS = Method(
    "Flow-CPS",
    f"{_SURROGATE}, r = exp(log_prob - old_log_prob) of the unnormalised log-probability",
    "2509.05952",
)
_DANCE = Method("DanceGRPO", _GRPO.formula, "2505.07818")
_RETHINKING = "rethinking-diffusion-rl (ICML 2026)"

METHODS: Mapping[str, Method] = {
    "flowrl.losses.dppo.DPPO": Method(
        "Flow-DPPO",
        "-A r where kept, 0 where dropped; dropped if D >= delta and (A > 0 and r > 1, or A < 0 "
        "and r < 1), with D the exact divergence of the step from the old policy's",
        "2606.11025",
    ),
    "flowrl.losses.cppo.CPPO": Method(
        "CPPO",
        "-A r where kept, 0 where dropped; dropped if w D > min(delta, delta (1 + budget_share W) "
        "- S) and (A > 0 and r > 1, or A < 0 and r < 1), with D the step's exact KL from the old "
        "policy's, S and W the sums of w D and w over the sample's earlier steps",
        "2606.10968",
    ),
    "flowrl.losses.grpo.GRPO": _GRPO,
    "flowrl.losses.guard.Guard": Method(
        "GRPO-Guard",
        f"{_SURROGATE} / -dt, r = exp((log_prob - old_log_prob + KL) std)",
        "2510.22319",
    ),
    "flowrl.losses.tempflow.TempFlow": Method(
        "TempFlow-GRPO's weight",
        f"std_weight std {_SURROGATE}, r = exp(log_prob - old_log_prob)",
        "2508.04324",
    ),
    "flowrl.losses.fdfo.FDFO": Method(
        "FDFO",
        "-A r + |A| (r - 1)^2 / (2 clip), r = exp(mean d^2 - mean (v - v_old + d)^2), with d the "
        "half difference of a pair's samples over its mean square",
        "2603.12893",
    ),
    "flowrl.losses.nft.NFT": Method(
        "Diffusion-NFT",
        "advantage_clip / beta (r |x0_plus - x0|^2 / w_plus + (1 - r) |x0_minus - x0|^2 / w_minus)",
        "2509.16117",
    ),
    "flowrl.losses.awm.AWM": Method(
        "Advantage Weighted Matching",
        f"{_SURROGATE}, r of log_prob = -w(mean (v - (eps - x0))^2)",
        "2509.25050",
    ),
    "flowrl.losses.pepg.PEPG": Method(
        "PEPG",
        "-exp(rho) (A - rho) elbo, rho = elbo - old_elbo",
        _RETHINKING,
    ),
    "flowrl.losses.epg.EPG": Method("EPG", "-exp(rho) A elbo, rho = elbo - old_elbo", _RETHINKING),
    "flowrl.losses.par.PAR": Method(
        "PAR", "exp(rho) (A - rho)^2 / 2, rho = elbo - old_elbo", _RETHINKING
    ),
    "flowrl.losses.flow_dpo.FlowDPO": Method(
        "Flow-DPO",
        "-log sigmoid(-beta / 2 ((d_w - anchor_d_w) - (d_l - anchor_d_l))) of a pair, "
        "d = mean (v - (eps - x0))^2",
        "2501.13918",
    ),
    "flowrl.losses.dgpo.DGPO": Method(
        "DGPO",
        "sigmoid(beta / G sum over the group of A (d - anchor_d)) A d, the sigmoid without "
        "gradient, d = mean (v - (eps - x0))^2",
        "2510.08425",
    ),
    "flowrl.losses.draft.DRaFT": Method(
        "DRaFT",
        "-min(r, reward_cap), with the gradient of the reward r through the scorer, the "
        "autoencoder and the last steps of the sampler",
        "2309.17400",
    ),
    "flowrl.losses.forward_dppo.ForwardDPPO": Method(
        "Forward DPPO",
        "-A exp(rho) where kept, 0 where dropped; dropped if w mean (v - old_v)^2 >= delta and "
        "(A > 0 and rho > 0, or A < 0 and rho < 0), rho = w mean ((u - old_v)^2 - (u - v)^2), "
        "u = eps - x0",
        "FlowRL's own, after 2606.11025",
    ),
    "flowrl.losses.opd.OPD": Method(
        "DiffusionOPD",
        "KL(N(mean, std^2) || N(teacher_mean, std^2)) = |mean - teacher_mean|^2 / (2 std^2), on "
        "the student's own states",
        "2605.15055",
    ),
}
"""The methods that FlowRL's losses are, by their import paths."""

_ARXIV = re.compile(r"\d{4}\.\d{5}")


def method_of(config: Config) -> Method:
    """Return the method of a run; a loss from outside is named by its class, without a formula."""
    target = _target(config, "loss")
    if target == "flowrl.losses.grpo.GRPO":
        # One loss is three published methods, which differ in what the ratio is taken of.
        loss = config["loss"]
        if loss.get("calibrated_for") == "unnormalised":
            return _CPS
        if _target(config, "sampler").endswith(".DanceSDE"):
            return _DANCE
    if target in METHODS:
        return METHODS[target]
    return Method(target.rpartition(".")[2] or "unknown", "", "")


def address_of(method: Method) -> str:
    """Return the address of a method's paper, or empty where it is none of arXiv's."""
    is_arxiv = _ARXIV.fullmatch(method.source) is not None
    return f"https://arxiv.org/abs/{method.source}" if is_arxiv else ""


def base_model_of(config: Config) -> str:
    """Return the hub id of the base model, `embedded:NAME` for what ships with FlowRL, and of a
    local folder its name alone, since where it lies is nobody else's business.

    It goes by the text's form. A folder whose path has that of a hub id is told apart by
    `flowrl.runs.base_model` before.
    """
    model = config.get("model")
    pretrained = model.get("pretrained") if isinstance(model, Mapping) else None
    text = str(pretrained or "unknown")
    return text if text.startswith(EMBEDDED) or is_hub_id(text) else plain_name(text)


def is_hub_id(text: str) -> bool:
    """Tell whether a text has the form ORG/NAME, by which the hub names repositories."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None


def plain_name(path: str) -> str:
    """Return the last segment of a path of any system's."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def reward_of(config: Config) -> str:
    """Return the reward's class, and for a mixture those of its terms with their weights."""
    reward = config.get("reward")
    name = _target(config, "reward").rpartition(".")[2] or "unknown"
    if not isinstance(reward, Mapping):
        return name
    terms = reward.get("rewards")
    if not isinstance(terms, Mapping):
        return name
    weights = reward.get("weights")
    words = []
    for key, node in terms.items():
        weight = weights.get(key, 1.0) if isinstance(weights, Mapping) else 1.0
        kind = _target({"reward": node}, "reward").rpartition(".")[2]
        amount = f"{weight:g}" if isinstance(weight, int | float) else str(weight)
        words.append(f"{amount} x {kind} ({key})")
    return f"{name}: {' + '.join(words)}"


def _target(config: Config, key: str) -> str:
    """Return the import path that a node names; empty where it is no node."""
    node = config.get(key)
    return str(node.get("_target_", "")) if isinstance(node, Mapping) else ""
