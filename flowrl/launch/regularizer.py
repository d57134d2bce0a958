"""Real images are compared with the run before weights load: with its model and its processes."""

from __future__ import annotations

from hydra.utils import get_object
from omegaconf import DictConfig

from flowrl.errors import UserError
from flowrl.models.protocol import EncodesImages, FlowModel
from flowrl.training.batch_plan import BatchPlan
from flowrl.training.data_regularizer import DataRegularizer
from flowrl.values.sizes import height_and_width


def check_regularizer(
    cfg: DictConfig, regularizer: DataRegularizer | None, plan: BatchPlan
) -> None:
    """Check that the model can encode a run's real images, that these are large enough for it, and
    that processes share them evenly.

    Raises UserError, in one line, where one of these does not hold.
    """
    if regularizer is None:
        return
    regularizer.require_processes(plan.num_processes)
    kind = get_object(cfg.model._target_)
    # What a function makes is looked at when it is made.
    if isinstance(kind, type) and not hasattr(kind, "encode_images"):
        raise _refusal(kind)
    resolution = cfg.model.get("resolution")
    if resolution is not None:
        regularizer.require_size(*height_and_width(resolution))


def check_encoder(regularizer: DataRegularizer | None, model: FlowModel) -> None:
    """Check the same of a model that is loaded, which no look at its class may have told.

    Raises UserError as `check_regularizer` does.
    """
    if regularizer is None:
        return
    if not isinstance(model, EncodesImages):
        raise _refusal(type(model))
    regularizer.require_size(*model.image_size)


def _refusal(kind: type) -> UserError:
    """Say that a class of models does not encode images."""
    return UserError(
        f"regularizer: real images are trained on as latents, for which {kind.__name__} has no "
        "encode_images; give it one (flowrl.models.protocol.EncodesImages), or set "
        "regularizer=none"
    )
