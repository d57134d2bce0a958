from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import runtime_types
from beartype.claw import beartype_packages
from jaxtyping import install_import_hook

# What the tests start says nothing of a busy machine, between the lines that they look at.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).parents[1]
SHAPED, PLAIN = runtime_types.packages(ROOT / "flowrl")
install_import_hook(SHAPED, "runtime_types.check")
beartype_packages(PLAIN, conf=runtime_types.PLAIN)

import pytest  # noqa: E402
import torch  # noqa: E402

hypothesis.settings.register_profile(
    "repeatable", deadline=None, max_examples=30, derandomize=True, database=None
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def grid():
    """The ten steps of SD3.5's grid (shift 3), for which published step values exist."""
    from flowrl.schedule import LinearShift, intervals

    return intervals(LinearShift(shift=3.0), 10)


@pytest.fixture
def normal():
    """Seeded standard normal tensors in float64."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def loss_inputs():
    """LossInputs from plain lists."""
    from flowrl.types import LossInputs

    def build(
        log_ratio,
        advantage,
        kl=None,
        tv=None,
        velocity=None,
        form="gaussian",
        reduction="mean",
        dimensions=1,
    ):
        ratios = torch.as_tensor(log_ratio, dtype=torch.float64).requires_grad_()
        none = torch.zeros(len(ratios), dtype=torch.float64)
        given = (advantage, kl, tv, velocity)
        as_double = [none if v is None else torch.tensor(v, dtype=torch.float64) for v in given]
        how = {"form": form, "reduction": reduction, "dimensions": dimensions}
        return LossInputs(ratios, *as_double, std=0.5, dt=-0.1, **how)

    return build


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory):
    """Folders of small random pipelines of each family, with all their text encoders."""
    from tiny import FAMILIES

    place = tmp_path_factory.mktemp("pipelines")
    return {name: family.save(place / name) for name, family in FAMILIES.items()}
