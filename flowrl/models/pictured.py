"""Whether prompts carry the pictures that a base model edits, seen before its weights load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.errors import UserError
from flowrl.models.protocol import EditModel, Use
from flowrl.types import Prompt


def check_pictures(model: Any, prompts: Sequence[Prompt]) -> None:
    """Raise UserError where prompts do not suit what a loaded model does with their pictures."""
    use = model.use if isinstance(model, EditModel) else "never"
    check_use(type(getattr(model, "pipeline", model)).__name__, use, prompts)


def check_config(kind: Any, node: Mapping[str, Any], prompts: Sequence[Prompt]) -> None:
    """Compare the prompts of a run with what a model that is not yet made says of pictures: its
    class, and the node of its configuration.

    Raises UserError, in one line, where prompts carry pictures and it takes none, where it needs
    them and they do not, and where some do and others do not.
    """
    if not isinstance(kind, type):
        return  # what a function makes is looked at when it is made
    if not hasattr(kind, "encode_edits"):
        check_use(kind.__name__, "never", prompts)
    elif hasattr(kind, "picture_use"):
        try:
            name, use = kind.picture_use(node["pretrained"], node.get("revision"))
        except UserError:
            # A hub that is not to be reached is told where the model is loaded.
            if any(prompt.image is not None for prompt in prompts):
                raise
        else:
            check_use(name, use, prompts)


def check_use(name: str, use: Use, prompts: Sequence[Prompt]) -> None:
    """Raise UserError where prompts do not suit how the model or pipeline `name` uses pictures."""
    pictured = [prompt for prompt in prompts if prompt.image is not None]
    others = [prompt for prompt in prompts if prompt.image is None]
    if pictured and use == "never":
        raise UserError(
            f"data: prompts carry pictures, such as {pictured[0].text!r:.80}, but a {name} takes "
            "none; choose a model that edits, or data.prompts.image=null"
        )
    if others and use == "always":
        raise UserError(
            f"data: prompts carry no picture, such as {others[0].text!r:.80}, but a {name} edits "
            "one; take data=jsonl with `image`, the path of a picture, in each line"
        )
    if pictured and others:
        raise UserError(
            f"data: some prompts carry pictures and others, such as {others[0].text!r:.80}, do "
            "not; a run needs them in all of its prompts or in none"
        )
