"""The arguments of a pipeline's call: which a configuration may give, and which FlowRL
gives itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from flowrl.errors import UserError
from flowrl.models.derived.leaving import Refused
from flowrl.models.protocol import Use
from flowrl.values.wording import meant, show

GUIDANCE = ("guidance_scale", "true_cfg_scale")
"""The arguments that may be the strength of guidance. The first that has a number as its default
is: where a distilled model's `guidance_scale` has none, the one of a second pass counts.
"""

UNGUIDED = 1.0
"""The scale that asks for no guidance."""

PICTURE = "image"
"""The argument that takes a prompt's picture."""

RESERVED = {
    **dict.fromkeys(
        ("prompt", "prompt_2", "prompt_3", "prompt_4"), "prompts come from data and evaluation"
    ),
    **dict.fromkeys(
        ("num_inference_steps", "sigmas", "timesteps", "mu"),
        "steps are rollout.num_steps and evaluation.num_steps, and the grid is schedule's",
    ),
    **dict.fromkeys(("latents", "generator"), "noise comes from seed"),
    **dict.fromkeys(
        ("output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"),
        "the launch sets it",
    ),
    PICTURE: "pictures come from data and evaluation, as `image` in each line of a jsonl file",
}
"""Arguments that a configuration may not give, and what decides them instead."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of one pipeline's call. `fixed` are those of the configuration, `guidance` is
    the one that takes the guidance scale, None where there is none.
    """

    names: frozenset[str]
    fixed: Mapping[str, Any]
    guidance: str | None
    default_scale: float
    num_steps: int
    has_guidance: bool

    def of(
        self,
        prompt: str,
        rows: int,
        scale: float,
        num_steps: int | None = None,
        picture: Image.Image | None = None,
    ) -> dict[str, Any]:
        """Return the arguments of a call for so many rows of a prompt, at this guidance scale, with
        one picture for all where there is any.
        """
        values = {
            **self.fixed,
            "prompt": [prompt] * rows,
            "num_inference_steps": num_steps or self.num_steps,
            "output_type": "pt",
            "return_dict": False,
        }
        if picture is not None:
            values[PICTURE] = picture
        negative = values.get("negative_prompt")
        # Where texts are a list, the texts to steer away from must be one too.
        if isinstance(negative, str):
            values["negative_prompt"] = [negative] * rows
        if self.guidance is not None:
            values[self.guidance] = scale
        return {name: value for name, value in values.items() if name in self.names}

    @property
    def recorded_scale(self) -> float:
        """The guidance scale at which texts are recorded: one at which all of them are encoded."""
        if not self.has_guidance:
            return UNGUIDED
        return self.default_scale if self.default_scale > 1 else 4.0


def use_of(kind: type[Any]) -> Use:
    """Tell from a pipeline's signatures how it uses a prompt's picture: always where its call has
    no default for it, or it reads it together with the text.
    """
    call = inspect.signature(inspect.unwrap(kind.__call__)).parameters
    if PICTURE not in call:
        return "never"
    if call[PICTURE].default is inspect.Parameter.empty:
        return "always"
    reader = getattr(kind, "encode_prompt", None)
    is_read = reader is not None and PICTURE in inspect.signature(reader).parameters
    return "always" if is_read else "sometimes"


def read(
    kind: type[Any], given: Mapping[str, Any], guidance: str | None, has_guidance: bool
) -> Arguments:
    """Compare the configured arguments with the signature of a pipeline's call.

    `guidance` names the argument that takes the guidance scale; None finds it. Raises UserError,
    naming the key, for one that the call does not take, for one that is not to be given, and where
    there is no guidance to have.
    """
    parameters = inspect.signature(inspect.unwrap(kind.__call__)).parameters
    if "prompt" not in parameters:
        raise Refused("its call takes no prompt")
    if "num_inference_steps" not in parameters:
        raise Refused("its call takes no num_inference_steps")
    name = guidance or _find_guidance(parameters)
    if name is not None and name not in parameters:
        taken = ", ".join(word for word in parameters if word.endswith("_scale")) or "none"
        raise UserError(
            f"model.guidance={name}: the call of {kind.__name__} takes no such argument, but "
            f"{taken}"
        )
    if name is None and has_guidance:
        raise Refused(
            "its call takes no guidance scale; set model.has_guidance=false, or name the argument "
            "by model.guidance"
        )
    for word, value in given.items():
        _check(kind, word, value, parameters, name)
    fixed = dict(given)
    if has_guidance and "negative_prompt" in parameters:
        fixed.setdefault("negative_prompt", "")
    default = parameters[name].default if name is not None else UNGUIDED
    steps = parameters["num_inference_steps"].default
    return Arguments(
        names=frozenset(parameters) - {"self"},
        fixed=fixed,
        guidance=name,
        default_scale=default if isinstance(default, (int, float)) else UNGUIDED,
        num_steps=steps if isinstance(steps, int) else 50,
        has_guidance=has_guidance,
    )


def _find_guidance(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """Return the argument that is the strength of guidance; None where there is none."""
    for name in GUIDANCE:
        if name in parameters and isinstance(parameters[name].default, (int, float)):
            return name
    return None


def _check(
    kind: type[Any],
    word: str,
    value: Any,
    parameters: Mapping[str, inspect.Parameter],
    guidance: str | None,
) -> None:
    """Raise UserError, naming the key, for an argument that a configuration may not give."""
    key = f"model.call.{word}={show(value)}"
    if word not in parameters or word == "self":
        raise UserError(
            f"{key}: the call of {kind.__name__} takes no such argument{meant(word, parameters)}"
        )
    if word == guidance:
        raise UserError(
            f"{key} is given by rollout.guidance_scale, evaluation.guidance_scale and "
            "penalty.guidance_scale; leave it out"
        )
    if word in RESERVED:
        raise UserError(f"{key} cannot be given: {RESERVED[word]}")
    if word.endswith(("_embeds", "_embeds_mask")) or word.startswith("callback"):
        raise UserError(f"{key} cannot be given: texts are embedded by the launch")
