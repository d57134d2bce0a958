"""How a pipeline's call is left: at the step that was asked for, or by a refusal in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowrl.errors import UserError, first_line
from flowrl.models.loading import META


class Ended(Exception):  # no error: how a pipeline's call is left
    """Leaves a pipeline's call where what was asked for is at hand."""


class Refused(UserError):
    """The reason alone, "it ...", why a pipeline cannot be derived from."""


@contextmanager
def refusing(pretrained: str, kind: type) -> Iterator[None]:
    """Name the pipeline and its class before the reason of a refusal; on the meta device calls may
    fail too, at numbers that they read.
    """
    try:
        yield
    except Refused as error:
        raise UserError(
            f"model.pretrained={pretrained}: a {kind.__name__} cannot be trained by model=derived: "
            f"{error}"
        ) from error
    except RuntimeError as error:
        if not pretrained.startswith(META):
            raise
        raise UserError(
            f"model.pretrained={pretrained.removeprefix(META)}: a {kind.__name__} called so cannot "
            f"be planned, since its numbers are not there ({first_line(error)}); a short run "
            "measures it"
        ) from error


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Refuse a pipeline whose own code fails, of which anything may be raised; a device that is
    short of memory says so itself.
    """
    try:
        yield
    except (UserError, Ended, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = type(error).__name__
        raise Refused(f"{what} fails ({kind}: {first_line(error)})") from error
