"""The accelerator that a run asks for is looked for before weights load."""

import pytest
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from omegaconf import OmegaConf

from flowrl.errors import UserError
from flowrl.launch.checks import check_accelerator


def test_an_accelerator_that_is_not_there_is_named(monkeypatch):
    """Mutation: leave it to Lightning, whose error comes after the weights and names no key."""
    for kind in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", staticmethod(lambda: False))
    expected = "trainer.accelerator=gpu: none is found on this machine; take cpu or auto"
    with pytest.raises(UserError, match=f"^{expected}$"):
        check_accelerator(OmegaConf.create({"trainer": {"accelerator": "gpu"}}))
    for accelerator in ("cpu", "auto", None):
        check_accelerator(OmegaConf.create({"trainer": {"accelerator": accelerator}}))
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    check_accelerator(OmegaConf.create({"trainer": {"accelerator": "gpu"}}))
