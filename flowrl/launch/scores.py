"""The prompts that a configured reward judges and the parts that it has, as far as they are known
before its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from flowrl.errors import UserError
from flowrl.rewards.mixture import Mixture
from flowrl.rewards.routed import Routed
from flowrl.runs.installation import CONF
from flowrl.types import Prompt
from flowrl.values.plural import counted
from flowrl.values.wording import meant

ALWAYS = ("reward", "missing", "diversity", "kl_ref", "alarms")
"""Scores that an evaluation has whatever the reward is."""


def parts_of(node: Mapping[str, Any]) -> list[str] | None:
    """Return the names of a reward's parts, from its configuration and its class, of which no
    instance is made; None where only the scorer knows.

    The parts of GenEval2 depend on the prompts' skills, those of a server on what it serves.
    """
    reward = get_object(node["_target_"])
    if reward is Routed:
        return parts_of(node["reward"])
    if reward is not Mixture:
        # Its own alone: a class that inherits from another may give other parts.
        names = vars(reward).get("part_names")
        return None if names is None else list(names)
    names_of_mixture = []
    for name, member in node["rewards"].items():
        names_of_member = parts_of(member)
        if names_of_member is None:
            return None
        names_of_mixture += [name, *(f"{name}_{part}" for part in names_of_member)]
    return names_of_mixture


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
    # By default the objective is the headline, under whose key a mistake is then told.
    if cfg.objective != cfg.evaluation.headline:
        asked.append(("objective", cfg.objective, [*ALWAYS, *names]))
    for key, name, known in asked:
        if name not in known:
            suggestion = meant(name, known)
            scores = ", ".join(known) or "none"
            raise UserError(
                f"{key}={name}: the reward has no such score{suggestion}; it has {scores}"
            )


@dataclass(frozen=True)
class Need:
    """The need of a reward, which only judges prompts that meet it, as a function and in words."""

    is_met: Callable[[Prompt], bool]
    words: str


def _needs() -> dict[str, Need]:
    """Return the needs of those rewards that have one, by their targets."""
    # Imported here, since these modules are heavier than most runs need.
    from flowrl.rewards.geneval_task import read_task
    from flowrl.rewards.ocr import plain, target_of
    from flowrl.shapes.grammar import parse

    def is_caption(prompt: Prompt) -> bool:
        try:
            parse(prompt.text)
        except ValueError:
            return False
        return True

    def is_task(prompt: Prompt) -> bool:
        try:
            read_task(prompt)
        except UserError:
            return False
        return True

    picture = Need(
        lambda prompt: prompt.image is not None,
        "pictures to be edited, as data=jsonl has with `image` in its lines",
    )
    return {
        "flowrl.rewards.ocr.OCR": Need(
            lambda prompt: bool(plain(target_of(prompt))),
            'text in double quotes, or metadata "target"',
        ),
        "flowrl.rewards.geneval.GenEval": Need(
            is_task, 'GenEval\'s metadata, "tag" and "include", as data=geneval has'
        ),
        "flowrl.rewards.geneval2.GenEval2": Need(
            lambda prompt: bool(prompt.metadata.get("vqa_list")),
            'metadata "vqa_list", as data=compositions has',
        ),
        "flowrl.rewards.preserve.Preserve": picture,
        "flowrl.rewards.edit_judge.EditJudge": picture,
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
    # A reward without a need judges any prompt.
    if not targets or not all(target in needs for target in targets):
        return
    if any(needs[target].is_met(prompt) for target in targets for prompt in prompts):
        return
    # Each need once, in the order of the rewards.
    words = " or ".join(dict.fromkeys(needs[target].words for target in targets))
    amount = counted(len(prompts), "prompt")
    raise UserError(
        f"{_named(targets[0])} could judge none of the {amount} of data, such as "
        f"{prompts[0].text!r}: it needs {words}; choose other data or another reward"
    )


def check_served(node: Any) -> None:
    """Refuse to serve a reward that reads the pictures which prompts edit: servers get none."""
    reward = OmegaConf.to_container(node, resolve=True)
    for target in _targets(reward):
        if getattr(get_object(target), "reads_pictures", False):
            raise UserError(
                f"{_named(target)} cannot be served: a server is not sent the pictures that "
                "prompts edit; name it in the run's own reward"
            )


def _named(target: str) -> str:
    """Return a reward as the command line names it: by the option that builds it alone, else by its
    class.
    """
    for path in sorted((CONF / "reward").glob("*.yaml")):
        if OmegaConf.select(OmegaConf.load(path), "_target_") == target:
            return f"reward={path.stem}"
    return f"reward._target_={target}"


def _targets(node: Any) -> Iterator[str]:
    """Yield every target of a reward, its own and those of whatever it asks in its turn."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)


def _trained(node: Any) -> list[str]:
    """Return the targets of the rewards that are trained on; one that is asked for some prompts
    only counts as `Routed`.
    """
    if get_object(node["_target_"]) is not Mixture:
        return [str(node["_target_"])]
    targets = []
    for name, reward in node["rewards"].items():
        if node["weights"].get(name):
            targets += _trained(reward)
    return targets
