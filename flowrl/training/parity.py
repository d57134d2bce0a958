"""The check that stands between an unknown pipeline and training: FlowRL's velocities, rollout and
images are those of the stock pipeline, a sample does not depend on its batch, and weights that are
not trained get no gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flowrl.algorithm import Algorithm
from flowrl.errors import UserError
from flowrl.images.pictures import read_upright
from flowrl.models.derived.adapter import Derived
from flowrl.models.derived.leaving import Refused, failing, refusing
from flowrl.models.derived.networks import steps_by_network
from flowrl.models.experts import networks_of
from flowrl.parallel.sharding import is_divided
from flowrl.training.parity_errors import (
    last_state,
    memory_error,
    replay_error,
    rows_error,
    share,
    velocity_errors,
)
from flowrl.training.policy import Policy
from flowrl.types import Conditioning, Prompt

log = logging.getLogger(__name__)

VELOCITY_BOUNDS = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.004}
"""What a velocity at a state of the stock sampling's may differ by, as a share of the largest
number, by the dtype of the networks.

The state has the stock one's dtype, to which pipelines round the timestep too. Without guidance
the numbers are the same bits; guidance is combined in float32, which stock pipelines do in the
networks' dtype: networks of random weights differ by up to 7e-3 in bfloat16. A wrong sign, time or
scale differs by 1 or so.
"""

ROLLOUT_BOUNDS = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
"""What the last state may differ by, whose steps FlowRL takes in float32 throughout, and stock
pipelines in the dtype of their embeddings: in bfloat16, of 8 bits, by up to 6e-2. So may an image.
"""

ROWS_BOUNDS = {"float32": 1e-4, "bfloat16": 0.08, "float16": 0.016}
"""What a sample may differ by beside others, where sums are of another order and guidance widens
what they differ by: in bfloat16 by up to 4e-2.
"""


class ParityError(UserError):
    """A pipeline does otherwise under FlowRL than by itself; the message says what differs."""


@dataclass(frozen=True)
class Parity:
    """The measurements at one guidance scale, each a share of the largest number of its kind, but
    for `image`, which lies in [0, 1].

    `velocity` is the largest difference at the stock sampling's own states, `rollout` that of the
    last states, `rows` that of a sample alone and beside others; `replay` is 0 where the same state
    gives the same bits again. `has_gradient` says how many of the trained weights the velocity
    depends on, None where they are divided over processes. `num_frames` are those of the stock
    pipeline's clip, which may be one alone, None where it draws pictures. `steps` are the
    numbers of the steps at which each of several networks is asked.
    """

    guidance_scale: float
    num_steps: int
    velocity: float
    rollout: float
    image: float
    rows: float
    replay: float
    has_gradient: int | None
    num_trained: int
    num_frames: int | None
    steps: Mapping[str, Sequence[int]]

    def describe(self) -> str:
        """Say in a line what was measured."""
        gradients = ""
        if self.has_gradient is not None:
            gradients = (
                f"; {self.has_gradient} of {self.num_trained} trained weights have a gradient"
            )
        asked = [f"; {name} at {_in_words(steps)}" for name, steps in self.steps.items()]
        return (
            f"guidance {self.guidance_scale:g}, {self.num_steps} steps: differences of velocity "
            f"{self.velocity:.1e}, rollout {self.rollout:.1e}, image {self.image:.1e}, rows "
            f"{self.rows:.1e}, replay {self.replay:g}{gradients}{''.join(asked)}"
        )


def _in_words(steps: Sequence[int]) -> str:
    """Return the numbers of steps, in rising order, in words."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if list(steps) == list(range(steps[0], steps[-1] + 1)):
        return f"steps {steps[0]} to {steps[-1]}"
    return f"steps {', '.join(map(str, steps))}"


def scales_of(method: Algorithm, evaluation_scale: float) -> list[float]:
    """Return the different guidance scales that a run draws, trains, evaluates and penalises
    with.
    """
    scales = [method.guidance_scale, evaluation_scale, method.scale_of_updates]
    if method.needs_reference:
        scales.append(method.penalty.guidance_scale)
    return list(dict.fromkeys(scales))


def check_policy(
    policy: Policy, *, evaluation_scale: float, prompts: Sequence[Prompt]
) -> list[Parity]:
    """Check a policy's derived model, at every guidance scale that its run uses.

    `prompts` are some of the run's, of which the first two different ones are taken; of a single
    one both rows are. Raises ParityError.
    """
    model = policy.model
    assert isinstance(model, Derived)
    different = list({prompt.key: prompt for prompt in prompts}.values())
    rows = policy.embed([different[0], different[min(1, len(different) - 1)]])
    parities = check(
        model,
        rows,
        policy.tuning.parameters(),
        scales=scales_of(policy.algorithm, evaluation_scale),
        num_steps=policy.algorithm.num_steps,
        seed=policy.seed,
        picture=picture_of(different[0]),
    )
    for name in untrained_networks(parities[0].steps, policy.objective.replayed_steps()):
        log.warning(
            "%s is asked at %s, none of which is trained on: it stays as it is; choose other "
            "steps, trained or rollout.num_steps",
            name,
            _in_words(parities[0].steps[name]),
        )
    return parities


def untrained_networks(steps: Mapping[str, Sequence[int]], replayed: Sequence[int]) -> list[str]:
    """Name the networks of several that are asked at none of the steps which updates replay; none
    where updates replay no step, but noise samples anew at all sigmas.
    """
    if not replayed:
        return []
    return [name for name, numbers in steps.items() if not set(numbers) & set(replayed)]


def picture_of(prompt: Prompt) -> Image.Image | None:
    """Read the picture that a prompt says how to edit, if any."""
    return None if prompt.image is None else read_upright(Path(prompt.image.path))


def check(
    model: Derived,
    conditioning: Conditioning,
    trained: Mapping[str, nn.Parameter],
    *,
    scales: Sequence[float],
    num_steps: int,
    seed: int,
    picture: Image.Image | None = None,
) -> list[Parity]:
    """Compare FlowRL with the stock pipeline at each guidance scale, on the rows of `conditioning`,
    of which there must be two; `picture` is that of the first row's prompt.

    Raises ParityError, in one line, for the first thing that differs, and UserError where the
    pipeline's own code fails.
    """
    # What its own code raises here, as for a size that its network does not take, is an answer.
    with refusing(model.pretrained, model.kind), failing("its call"):
        return [
            _check_scale(model, conditioning, trained, scale, num_steps, seed, picture)
            for scale in scales
        ]


def record_of(parities: Sequence[Parity], model: Derived) -> dict[str, object]:
    """Return what was measured as plain data, with what it was measured on."""
    return {
        "pipeline": model.kind.__name__,
        "model": model.identity,
        "dtype": model.dtype,
        "bounds": {
            "velocity": VELOCITY_BOUNDS[model.dtype],
            "rollout": ROLLOUT_BOUNDS[model.dtype],
            "image": ROLLOUT_BOUNDS[model.dtype],
            "rows": ROWS_BOUNDS[model.dtype],
        },
        "checks": [asdict(parity) for parity in parities],
    }


def _check_scale(
    model: Derived,
    conditioning: Conditioning,
    trained: Mapping[str, nn.Parameter],
    scale: float,
    num_steps: int,
    seed: int,
    picture: Image.Image | None,
) -> Parity:
    bound = ROLLOUT_BOUNDS[model.dtype]
    first = conditioning[:1]
    stock = model.sample_stock(first, scale, num_steps, seed, picture)
    sigmas = model.grid(num_steps)
    x = stock.steps[len(stock.steps) // 2].before.float()
    sigma = sigmas[len(stock.steps) // 2]
    replay = replay_error(model, first, scale, x, sigma)
    # First, since the stock pipeline differs from a guidance with memory at every state but one.
    again = "velocity of the same state after another one, which its guidance remembers,"
    _require(model, again, replay, 0.0, scale, "the first time")
    velocities = velocity_errors(model, first, scale, stock, sigmas)
    velocity_bound = VELOCITY_BOUNDS[model.dtype]
    velocity = max(velocities)
    if velocities[0] <= velocity_bound < velocity:
        memory = memory_error(model, first, scale, stock, seed)
        what = "stock pipeline's velocity of a state that other steps led to, which its guidance "
        what += "remembers,"
        _require(model, what, memory, velocity_bound, scale, "its own")
    what = "velocity at the stock pipeline's own states"
    _require(model, what, velocity, velocity_bound, scale)
    x0 = last_state(model, first, scale, stock, sigmas)
    last = stock.steps[-1].after.float()
    rollout = share(x0, last)
    _require(model, "last state of a noise-free rollout", rollout, bound, scale)
    images = model.decode(last)
    image = float((images - stock.images.view_as(images)).abs().max())
    _require(model, "decoded image of the same state", image, bound, scale)
    rows = rows_error(model, conditioning, scale, x, sigma)
    rows_bound = ROWS_BOUNDS[model.dtype]
    _require(model, "velocity of a sample beside others", rows, rows_bound, scale, "one alone")

    def ask(i: int) -> None:
        with torch.no_grad():
            model.velocity(stock.steps[i].before, sigmas[i], first, scale)

    asked = steps_by_network(networks_of(model.transformer), ask, len(stock.steps))
    has_gradient = None
    # Weights that are divided over processes are gathered pass by pass, and not by these.
    if not is_divided(model.transformer):
        reached: set[str] = set()
        middle = len(stock.steps) // 2
        # The one nearest to the middle of those that ask each network.
        numbers = {min(numbers, key=lambda i: abs(i - middle)) for numbers in asked.values()}
        for i in sorted(numbers):
            state = stock.steps[i].before.float()
            _check_recomputation(model, first, scale, state, sigmas[i])
            reached |= _reached(model, first, scale, state, sigmas[i], trained)
        has_gradient = len(reached)
    return Parity(
        guidance_scale=scale,
        num_steps=num_steps,
        velocity=velocity,
        rollout=rollout,
        image=image,
        rows=rows,
        replay=replay,
        has_gradient=has_gradient,
        num_trained=len(trained),
        num_frames=stock.num_frames,
        steps=asked if len(asked) > 1 else {},
    )


def _require(
    model: Derived,
    what: str,
    error: float,
    bound: float,
    scale: float,
    other: str = "the stock pipeline's",
) -> None:
    """Raise ParityError where something differs by more than the bound, or is no number."""
    if not error <= bound:
        raise ParityError(
            f"model.pretrained={model.pretrained}: a {model.kind.__name__} is not trained, since "
            f"the {what} differs from {other} by {error:.2g}, above {bound:g} for {model.dtype}, "
            f"at guidance_scale={scale:g}"
        )


def _check_recomputation(
    model: Derived, row: Conditioning, scale: float, x: Tensor, sigma: float
) -> None:
    """Raise ParityError where gradient checkpointing is on and changes what the network gives.

    Some networks hand their blocks other arguments where these are to be recomputed, so that
    updates would see another velocity than rollouts, in which checkpointing is off by itself.
    """
    network: Any = model.transformer
    if not getattr(network, "is_gradient_checkpointing", False):
        return
    key = (
        f"model.pretrained={model.pretrained}: backend.gradient_checkpointing=true is not for a "
        f"{model.kind.__name__}"
    )
    with torch.no_grad():
        plain = model.velocity(x, sigma, row, scale)
    # Blocks are recomputed only where something needs a gradient.
    state = x.clone().requires_grad_()
    try:
        with torch.enable_grad(), failing("its call"):
            recomputed = model.velocity(state, sigma, row, scale).detach()
    except Refused as error:
        raise ParityError(f"{key}: with it, {error}; set it to false") from error
    difference = share(recomputed, plain)
    if not difference <= VELOCITY_BOUNDS[model.dtype]:
        raise ParityError(
            f"{key}: with it, the velocity differs by {difference:.2g} from the one of rollouts; "
            "set it to false"
        )


def _require_named(network: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
    """Raise ParityError for a weight that would get a gradient and is none of the trained ones."""
    for name, weight in network.named_parameters():
        if weight.requires_grad and not any(weight is known for known in trained.values()):
            raise ParityError(f"{name} would be trained, though the tuning does not name it")


def _reached(
    model: Derived,
    row: Conditioning,
    scale: float,
    x: Tensor,
    sigma: float,
    trained: Mapping[str, nn.Parameter],
) -> set[str]:
    """Return the names of the trained weights that the velocity has a gradient in. Raises
    ParityError where that is none, and where another weight would get one.
    """
    _require_named(model.transformer, trained)
    with torch.enable_grad():
        velocity = model.velocity(x, sigma, row, scale)
        if not velocity.requires_grad:
            raise ParityError(
                f"model.pretrained={model.pretrained}: the velocity does not depend on the trained "
                f"weights; {model.kind.__name__} switches gradients off on the way"
            )
        gradients = torch.autograd.grad(
            velocity.square().mean(), list(trained.values()), allow_unused=True
        )
    reached = {
        name
        for name, gradient in zip(trained, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    }
    if not reached:
        raise ParityError(
            f"model.pretrained={model.pretrained}: no trained weight changes the velocity; name "
            "other lora.targets"
        )
    return reached
