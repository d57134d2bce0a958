"""The accelerator that a run asks for is looked for before weights load."""

import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from omegaconf import OmegaConf

from flowrl.errors import UserError
from flowrl.launch.checks import check_accelerator, emulation


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


@pytest.mark.parametrize("is_emulated", [True, False])
def test_a_gpu_that_emulates_bfloat16_is_named(is_emulated, monkeypatch):
    """PyTorch calls bfloat16 supported either way. Mutation: ask without looking at emulation, or
    name a GPU in any dtype.
    """

    def is_supported(including_emulation=True):
        return including_emulation or not is_emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda", 0)
    told = emulation(gpu, "bfloat16")
    assert (told or "").startswith("Tesla T4 only emulates model.dtype=bfloat16") == is_emulated
    assert emulation(gpu, "float32") is None
    assert emulation(torch.device("cpu"), "bfloat16") is None
