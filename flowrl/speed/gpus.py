"""The rated speed of common GPUs in dense matrix products, by their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
HOPPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
H200 = "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446"
BLACKWELL = "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet"
L4 = "https://www.nvidia.com/en-us/data-center/l4/"
L40S = "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413"
A10G = (
    "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf"
)
GA102 = "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
RTX_BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/"
    "nvidia-rtx-blackwell-gpu-architecture.pdf"
)
V100 = (
    "https://images.nvidia.com/content/technologies/volta/pdf/"
    "volta-v100-datasheet-update-us-1165301-r5.pdf"
)
T4 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/"
    "t4-tensor-core-datasheet-951643.pdf"
)

MAKER = re.compile(r"^(NVIDIA |Tesla )+")
"""The words before a GPU's own name, which drivers of other years leave out."""


@dataclass(frozen=True, slots=True)
class GPU:
    """A GPU as people call it, and its ratings in TFLOP/s.

    `pattern` matches the whole name that its driver tells, without the maker's. The ratings are
    those of dense products, at the boost clock, which add in float32; where a data sheet gives
    those of sparse ones, half of them. `tf32` is of float32 products that are rounded to TF32,
    `float32` of exact ones. None is a format that the GPU does not compute in.
    """

    name: str
    pattern: str
    bfloat16: float | None
    float16: float
    tf32: float | None
    float32: float
    source: str


GPUS = (
    GPU("A100", r"A100-(SXM4?|PCIE)-[48]0GB|A100 80GB PCIe", 312, 312, 156, 19.5, A100),
    GPU("H100 SXM", "H100 80GB HBM3", 989.4, 989.4, 494.7, 66.9, HOPPER),
    GPU("H100 PCIe", "H100 PCIe", 756, 756, 378, 51.2, HOPPER),
    GPU("H100 NVL", "H100 NVL", 835.5, 835.5, 417.5, 60, H100),
    # The chip of H100 SXM, of which its data sheet gives the same sparse ones.
    GPU("H200 SXM", "H200", 989.4, 989.4, 494.7, 66.9, H200),
    GPU("H200 NVL", "H200 NVL", 835.5, 835.5, 417.5, 60, H200),
    GPU("B200", "B200", 2250, 2250, 1100, 75, BLACKWELL),
    GPU("L4", "L4", 121, 121, 60, 30.3, L4),
    GPU("L40S", "L40S", 362.05, 362.05, 183, 91.6, L40S),
    GPU("A10G", "A10G", 70, 70, 35, 35, A10G),
    GPU("RTX 3090", "GeForce RTX 3090", 71, 71, 35.6, 35.6, GA102),
    GPU("RTX 4070 Ti", "GeForce RTX 4070 Ti", 80.2, 80.2, 40.1, 40.1, ADA),
    GPU("RTX 4080", "GeForce RTX 4080", 97.5, 97.5, 48.7, 48.7, ADA),
    GPU("RTX 4090", "GeForce RTX 4090", 165.2, 165.2, 82.6, 82.6, ADA),
    GPU("RTX 5090", "GeForce RTX 5090", 209.5, 209.5, 104.8, 104.8, RTX_BLACKWELL),
    GPU("V100 SXM2", r"V100-SXM2-(16|32)GB", None, 125, None, 15.7, V100),
    GPU("V100 PCIe", r"V100-PCIE-(16|32)GB", None, 112, None, 14, V100),
    GPU("T4", "T4", None, 65, None, 8.1, T4),
)
"""The GPUs whose ratings are known here."""


@dataclass(frozen=True, slots=True)
class Rating:
    """A GPU's rated speed in one kind of product."""

    gpu: str
    kind: str
    tflops: float

    @property
    def speed(self) -> float:
        """Return the operations a second."""
        return self.tflops * 1e12

    def __str__(self) -> str:
        tflops = round(self.tflops) if self.tflops >= 100 else self.tflops
        return f"{self.gpu}, {tflops} TFLOP/s in {self.kind}, dense"


def find(device_name: str) -> GPU | None:
    """Return the GPU that `torch.cuda.get_device_name` calls so; None where it is not known here,
    as is a part of one (MIG).
    """
    name = MAKER.sub("", device_name)
    for gpu in GPUS:
        if re.fullmatch(gpu.pattern, name):
            return gpu
    return None


def rating(device_name: str, dtype: torch.dtype, precision: str) -> Rating | None:
    """Return a GPU's rating in products of a dtype, or None where none is known here.

    `precision` is `torch.get_float32_matmul_precision()`: both `high` and `medium` let a GPU round
    float32 products to TF32, where it computes in that.
    """
    gpu = find(device_name)
    if gpu is None:
        return None
    kind = str(dtype).removeprefix("torch.")
    tflops = {"bfloat16": gpu.bfloat16, "float16": gpu.float16, "float32": gpu.float32}.get(kind)
    if dtype == torch.float32 and precision != "highest" and gpu.tf32 is not None:
        kind = "TF32"
        tflops = gpu.tf32
    return None if tflops is None else Rating(gpu.name, kind, tflops)
