"""Check that a pipeline of diffusers does the same under FlowRL as by itself.

    python scripts/check_model.py model=derived model.pretrained=ORG/NAME
    python scripts/check_model.py model=derived model.pretrained=FOLDER 'model.call={height: 512}'

One sample is drawn by the stock pipeline, and its velocities, last state and image are compared
with FlowRL's, at every guidance scale that a run would use. A sample may not depend on its batch,
the same state must give the same bits again, and trained weights must have a gradient. Training
does the same before its first iteration, and keeps what was measured in the run's parity.json.

Exit status 1, and one line, for a pipeline that would not be trained.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from flowrl.algorithm import Algorithm
from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.launch.checks import check_guidance
from flowrl.launch.compose import compose
from flowrl.launch.search_path import with_config_dir
from flowrl.launch.validate import validate
from flowrl.models.derived.adapter import Derived
from flowrl.models.derived.edits import drawn_picture
from flowrl.models.experts import networks_of
from flowrl.models.text import device
from flowrl.training.parity import check, scales_of
from flowrl.tuning.protocol import TuningRecipe
from flowrl.types import Conditioning

PROMPTS = ("a photo of a red cube", "two blue books on a round wooden table")

CALLS = 5
"""How many calls the time of one is the least of."""


def examine(cfg: DictConfig, is_edit: bool = False) -> list[str]:
    """Load a derived model, check it, with a picture beside each prompt where it edits, and say
    what was measured.

    Raises UserError for a model of another kind, and what the check raises.
    """
    validate(cfg)
    check_guidance(cfg)
    algorithm: Algorithm = instantiate(cfg.algorithm)
    model = instantiate(cfg.model)
    if not isinstance(model, Derived):
        raise UserError(
            f"model._target_={cfg.model._target_} has an adapter of its own, which FlowRL's tests "
            "hold to its stock pipeline; give model=derived"
        )
    recipe: TuningRecipe = instantiate(cfg.tuning)
    recipe.check_layers(model.transformer)
    trained = recipe.attach(model.transformer, cfg.seed).parameters()
    instantiate(cfg.backend).apply(model)
    place = device()
    pictures = [drawn_picture(seed) for seed in range(1, 1 + len(PROMPTS))]
    is_edit = is_edit or model.use == "always"
    if is_edit and model.use == "never":
        raise UserError(f"--edit: a {model.kind.__name__} takes no picture; leave --edit out")
    encoded = model.encode_edits(PROMPTS, pictures) if is_edit else model.encode_prompts(PROMPTS)
    rows = encoded.to(place)
    model.drop_text_encoders()
    model.to(place)
    scales = scales_of(algorithm, cfg.evaluation.guidance_scale)
    parities = check(
        model,
        rows,
        trained,
        scales=scales,
        num_steps=algorithm.num_steps,
        seed=cfg.seed,
        picture=pictures[0] if is_edit else None,
    )
    return [
        f"{model.kind.__name__}: state {model.latent_shape}, {model.dtype} on {place.type}, "
        f"guidance by {model.arguments.guidance}",
        *(parity.describe() for parity in parities),
        describe_times(model, rows[:1], scales[0]),
    ]


def describe_times(model: Derived, row: Conditioning, scale: float) -> str:
    """Say how long a velocity takes, and how much of that is outside the network."""
    total, outside = measure_times(model, row, scale)
    return f"a velocity of one row: {total:.1f} ms, {outside:.1f} outside the network"


@torch.no_grad()
def measure_times(model: Derived, row: Conditioning, scale: float) -> tuple[float, float]:
    """Return the milliseconds of a velocity of one row, and those of them outside the network."""
    x = torch.randn(1, *model.latent_shape, device=row.device)
    sigma = model.grid(2)[0]
    totals = []
    inside = []
    with timing(networks_of(model.transformer).values(), row.device) as laps:
        for _ in range(CALLS):
            laps.clear()
            start = now(row.device)
            model.velocity(x, sigma, row, scale)
            totals.append(now(row.device) - start)
            inside.append(sum(laps))
    best = min(range(CALLS), key=totals.__getitem__)
    return 1000 * totals[best], 1000 * (totals[best] - inside[best])


@contextmanager
def timing(networks: Iterable[torch.nn.Module], place: torch.device) -> Iterator[list[float]]:
    """Collect the seconds of each forward pass of some networks, which are on one device."""
    starts: list[float] = []
    laps: list[float] = []
    hooks = []
    for network in networks:
        begin = network.register_forward_pre_hook(lambda *_: starts.append(now(place)))
        end = network.register_forward_hook(lambda *_: laps.append(now(place) - starts.pop()))
        hooks += [begin, end]
    try:
        yield laps
    finally:
        for hook in hooks:
            hook.remove()


def now(place: torch.device) -> float:
    """Return the time when a device has done what it was given."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


def main() -> None:
    """Read the command line, check, and print what was measured."""
    args = arguments.parity().parse_intermixed_args()
    overrides = with_config_dir(args.overrides, args.config_dir)
    for line in examine(compose(["name=check", *overrides]), args.edit):
        print(line)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
