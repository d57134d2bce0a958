"""What a configured reward judges and which parts it has, as far as that is known before its
weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.types import Prompt
from flowrl.values.wording import meant

PARTS: Mapping[str, tuple[str, ...]] = {
    "flowrl.rewards.shapes.ShapesReward": ("soft", "strict", "off_palette", "clean_objects"),
    "flowrl.rewards.shapes_proxy.ShapesProxy": ("cosine",),
    "flowrl.rewards.jpeg.JPEG": ("kilobytes",),
    "flowrl.rewards.brisque.BRISQUE": ("score",),
    "flowrl.rewards.ocr.OCR": ("exact",),
    "flowrl.rewards.clip_score.CLIPScore": ("cosine",),
    "flowrl.rewards.hpsv2.HPSv2": (),
    "flowrl.rewards.hpsv3.HPSv3": (),
    "flowrl.rewards.image_reward.ImageReward": (),
    "flowrl.rewards.aesthetic.Aesthetic": (),
    "flowrl.rewards.unified_reward.UnifiedReward": (),
}
"""Those of GenEval2 depend on the prompts' skills, those of a server on what it serves."""

ALWAYS = ("reward", "missing", "diversity", "kl_ref", "alarms")
"""Scores that an evaluation has whatever the reward is."""

MIXTURE = "flowrl.rewards.mixture.Mixture"
ROUTED = "flowrl.rewards.routed.Routed"


def parts_of(node: Mapping[str, Any]) -> list[str] | None:
    """The names of a reward's parts, from its configuration; None where only the scorer knows."""
    target = node["_target_"]
    if target == ROUTED:
        return parts_of(node["reward"])
    if target != MIXTURE:
        return list(PARTS[target]) if target in PARTS else None
    names = []
    for name, reward in node["rewards"].items():
        inner = parts_of(reward)
        if inner is None:
            return None
        names += [name, *(f"{name}_{part}" for part in inner)]
    return names


def check_parts(cfg: DictConfig) -> None:
    """Refuse a headline, an objective or a gold metric that the reward does not have, where that is
    known.
    """
    reward = OmegaConf.to_container(cfg.reward, resolve=True)
    assert isinstance(reward, dict)
    names = parts_of({str(key): value for key, value in reward.items()})
    if names is None:
        return
    asked = [("evaluation.headline", cfg.evaluation.headline, ["reward", *names])]
    asked += [("viewing.gold", name, names) for name in cfg.viewing.gold]
    if cfg.objective != cfg.evaluation.headline:
        asked.append(("objective", cfg.objective, [*ALWAYS, *names]))
    for key, name, known in asked:
        if name not in known:
            raise UserError(
                f"{key}={name}: the reward has no such score{meant(name, known)}; it has "
                f"{', '.join(known) or 'none'}"
            )


@dataclass(frozen=True)
class Need:
    """What a reward needs of a prompt to judge it, as a function and in words."""

    is_met: Callable[[Prompt], bool]
    words: str


def _needs() -> dict[str, Need]:
    from flowrl.rewards.ocr import plain, target_of
    from flowrl.shapes.grammar import parse

    def is_caption(prompt: Prompt) -> bool:
        try:
            parse(prompt.text)
        except ValueError:
            return False
        return True

    return {
        "flowrl.rewards.ocr.OCR": Need(
            lambda prompt: bool(plain(target_of(prompt))),
            'text in double quotes, or metadata "target"',
        ),
        "flowrl.rewards.geneval2.GenEval2": Need(
            lambda prompt: bool(prompt.metadata.get("vqa_list")),
            'metadata "vqa_list", as data=compositions has',
        ),
        "flowrl.rewards.shapes.ShapesReward": Need(
            is_caption, "captions of the shapes world, as data=shapes has"
        ),
    }


def check_prompts(cfg: DictConfig, prompts: Sequence[Prompt]) -> None:
    """Refuse a run in which no trained reward could judge any of the training prompts.

    Where there are none, as in an evaluation, nothing is trained.
    """
    if not prompts:
        return
    reward = OmegaConf.to_container(cfg.reward, resolve=True)
    needs = _needs()
    targets = _trained(reward)
    if not targets or not all(target in needs for target in targets):
        return
    if not any(needs[target].is_met(prompt) for target in targets for prompt in prompts):
        words = " or ".join(dict.fromkeys(needs[target].words for target in targets))
        raise UserError(
            f"reward._target_={targets[0]} could judge none of the {len(prompts)} prompts of data, "
            "such as "
            f"{prompts[0].text!r}: it needs {words}; choose other data or another reward"
        )


def _trained(node: Any) -> list[str]:
    """The targets of the rewards that are trained on; those that are asked for some prompts only
    are left out.
    """
    if node["_target_"] != MIXTURE:
        return [str(node["_target_"])]
    weights = node["weights"]
    return [
        target
        for name, each in node["rewards"].items()
        if weights.get(name)
        for target in _trained(each)
    ]
