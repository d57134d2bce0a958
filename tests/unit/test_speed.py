"""What is said of an iteration's speed: GPUs' ratings, a device's gaps, operators, utilisation."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from flowrl.speed.bare_parts import slowest
from flowrl.speed.gpus import GPUS, rating
from flowrl.speed.operations import utilisation
from flowrl.speed.trace import Idle, break_down, find_idle


@pytest.mark.parametrize(
    ("device", "dtype", "precision", "told"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", "highest", "H100 SXM, 989 TFLOP/s in bfloat16"),
        ("NVIDIA H100 PCIe", "bfloat16", "highest", "H100 PCIe, 756 TFLOP/s in bfloat16"),
        ("NVIDIA H200", "float32", "highest", "H200 SXM, 66.9 TFLOP/s in float32"),
        ("NVIDIA A100-SXM4-40GB", "float32", "high", "A100, 156 TFLOP/s in TF32"),
        ("A100-PCIE-40GB", "float32", "medium", "A100, 156 TFLOP/s in TF32"),
        ("NVIDIA A100 80GB PCIe", "float32", "highest", "A100, 19.5 TFLOP/s in float32"),
        ("NVIDIA B200", "bfloat16", "highest", "B200, 2250 TFLOP/s in bfloat16"),
        ("NVIDIA L4", "bfloat16", "high", "L4, 121 TFLOP/s in bfloat16"),
        ("NVIDIA L40S", "bfloat16", "highest", "L40S, 362 TFLOP/s in bfloat16"),
        ("NVIDIA A10G", "bfloat16", "highest", "A10G, 70 TFLOP/s in bfloat16"),
        ("NVIDIA GeForce RTX 3090", "bfloat16", "highest", "RTX 3090, 71 TFLOP/s in bfloat16"),
        ("NVIDIA GeForce RTX 4090", "float16", "highest", "RTX 4090, 165 TFLOP/s in float16"),
        ("NVIDIA GeForce RTX 5090", "float32", "high", "RTX 5090, 105 TFLOP/s in TF32"),
        ("Tesla V100-SXM2-16GB", "float32", "high", "V100 SXM2, 15.7 TFLOP/s in float32"),
        ("Tesla T4", "float16", "highest", "T4, 65 TFLOP/s in float16"),
    ],
)
def test_a_gpus_rating_is_that_of_its_products(device, dtype, precision, told):
    """Mutation: rate float32 products that are rounded to TF32 as exact ones, or a GPU that has no
    TF32 as if it had.
    """
    assert str(rating(device, getattr(torch, dtype), precision)) == f"{told}, dense"


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16),
        ("NVIDIA GeForce RTX 3090 Ti", torch.bfloat16),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
        ("NVIDIA L40", torch.bfloat16),
        ("NVIDIA GH200 480GB", torch.bfloat16),
        ("Tesla T4", torch.bfloat16),
        ("NVIDIA H200", torch.float64),
    ],
)
def test_a_gpu_or_a_format_that_is_not_known_has_no_rating(device, dtype):
    """Mutation: match the beginning of a name, and rate a part of a GPU, or its sister, as it."""
    assert rating(device, dtype, "highest") is None


def test_half_the_bits_are_at_least_as_fast():
    """Each GPU's ratings in the order of their bits, and no name twice. Mutation: exchange two."""
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        ratings = [gpu.float32, gpu.tf32, gpu.bfloat16, gpu.float16]
        known = [number for number in ratings if number is not None]
        assert known == sorted(known), gpu.name
        assert gpu.source.startswith("https://")


def test_utilisation_by_hand():
    """30 operations in 2 seconds are 15 a second, a quarter of 60. Mutation: forget the time."""
    assert utilisation(30.0, 2.0, 60.0) == 0.25


def test_gaps_by_hand():
    """Of 0 to 10, two streams leave 0.5 to 1, 4 to 6 and 7 to 9. Mutation: count an overlap twice,
    begin at the first kernel, or end at the last.
    """
    busy = [(6.0, 7.0), (1.0, 3.0), (-2.0, 0.5), (2.0, 4.0), (2.5, 2.6), (9.0, 12.0)]
    assert find_idle(busy, 0.0, 10.0) == Idle(total=4.5, longest=2.0, num_gaps=3)
    assert find_idle([(1.0, 2.0), (11.0, 12.0), (13.0, 14.0)], 0.0, 10.0) == Idle(9.0, 8.0, 2)
    assert find_idle([], 0.0, 10.0) == Idle(10.0, 10.0, 1)
    assert find_idle([(-1.0, 11.0)], 0.0, 10.0) == Idle(0.0, 0.0, 0)


def event(name, start, end, *, on=DeviceType.CPU, own=0.0, kernels=(), is_annotation=False):
    """An event as PyTorch's profiler has them, in microseconds."""
    return SimpleNamespace(
        name=name,
        device_type=on,
        time_range=SimpleNamespace(start=start, end=end),
        self_cpu_time_total=own,
        kernels=[SimpleNamespace(duration=duration) for duration in kernels],
        is_user_annotation=is_annotation,
    )


CUDA = DeviceType.CUDA
EVENTS = [
    event("iteration", 100.0, 200.0, own=7.0, is_annotation=True),
    event("an optimizer's step", 150.0, 190.0, own=2.0, is_annotation=True),
    event("aten::mm", 100.0, 110.0, own=5.0, kernels=[30.0]),
    event("aten::mm", 110.0, 130.0, own=15.0, kernels=[5.0, 5.0]),
    event("aten::matmul", 100.0, 112.0, own=2.0),
    event("aten::relu", 130.0, 135.0, own=1.0, kernels=[10.0]),
    event("a kernel", 110.0, 140.0, on=CUDA),
    event("a kernel", 140.0, 145.0, on=CUDA),
    event("a kernel", 145.0, 150.0, on=CUDA),
    event("a kernel", 160.0, 170.0, on=CUDA),
    event("a scorer's kernel", 180.0, 184.0, on=CUDA),
    event("iteration", 100.0, 200.0, on=CUDA, is_annotation=True),
]


def test_a_breakdown_on_a_device_by_hand():
    """The kernels leave 100 - 30 - 5 - 5 - 10 - 4 = 46 microseconds: 10 before them, 10 and 10
    between, 16 behind. Mutation: count the annotation of the device for work, or an operator's time
    on the CPU.
    """
    breakdown = break_down(EVENTS, "iteration", has_device=True)
    assert breakdown.seconds == pytest.approx(100e-6)
    assert [(o.name, o.num_calls) for o in breakdown.operators] == [
        ("aten::mm", 2),
        ("aten::relu", 1),
    ]
    assert [o.seconds for o in breakdown.operators] == pytest.approx([40e-6, 10e-6])
    assert breakdown.rest == pytest.approx(4e-6)
    idle = breakdown.idle
    assert (idle.total, idle.longest) == pytest.approx((46e-6, 16e-6)) and idle.num_gaps == 4


def test_a_breakdown_on_the_cpu_by_hand():
    """Operators by their own time, and that of annotations outside of all of them. Mutation: take
    an annotation for an operator, or leave out those within.
    """
    on_cpu = [event for event in EVENTS if event.device_type == DeviceType.CPU]
    breakdown = break_down(on_cpu, "iteration", has_device=False)
    assert [o.name for o in breakdown.operators] == ["aten::mm", "aten::matmul", "aten::relu"]
    assert [o.seconds for o in breakdown.operators] == pytest.approx([20e-6, 2e-6, 1e-6])
    assert breakdown.rest == pytest.approx(9e-6)
    assert breakdown.idle is None


def test_bare_parts_are_those_of_the_slowest_process():
    """Of each iteration by itself, all parts of one process. Mutation: take each part's largest, or
    the process with the longest part.
    """
    first = [{"rollout": 3.0, "update": 1.0}, {"rollout": 2.5, "update": 0.1}]
    second = [{"rollout": 1.0, "update": 2.0}, {"rollout": 1.5, "update": 1.5}]
    assert slowest([first, second]) == [first[0], second[1]]
