"""Layers in fewer bits: their numbers, their gradients, their bytes, and what is refused."""

import pytest
import torch
from torch import nn

from flowrl.errors import UserError
from flowrl.models.quantization import (
    KINDS,
    FP8Linear,
    Int8Linear,
    NF4Linear,
    QuantizedLinear,
    is_quantized,
    nf4_quantiles,
    quantize,
)
from flowrl.tuning.full import Full


def linear(rows, bias=False):
    """A layer of these weights."""
    weight = torch.tensor(rows, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    layer.weight.data = weight
    return layer


def test_a_kind_that_does_not_say_how_it_compresses_is_no_kind():
    """Mutation: make a layer whose first pass fails."""
    with pytest.raises(NotImplementedError, match="QuantizedLinear does not say how it compresses"):
        QuantizedLinear(linear([[1.0, 2.0]]))


class Network(nn.Module):
    """A list of blocks between two layers, as transformers have them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(2)]
        )
        self.last = nn.Linear(64, 32)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def test_8_bits_of_whole_numbers():
    """A row's largest weight is 127 steps; one of zeros stays zeros.

    Mutation: one scale for all rows, or 128 steps.
    """
    layer = Int8Linear(linear([[1.27, -0.5, 0.014], [0.0, 0.0, 0.0], [0.0127, 0.0, -0.0001]]))
    assert layer.weight.tolist() == [[127, -50, 1], [0, 0, 0], [127, 0, -1]]
    expected = torch.tensor([[1.27, -0.5, 0.01], [0.0, 0.0, 0.0], [0.0127, 0.0, -0.0001]])
    torch.testing.assert_close(layer.restore(torch.float32), expected, rtol=1e-6, atol=1e-9)


def test_8_bits_of_floating_point():
    """A row's largest weight is 448, the format's largest, and neighbours there are 32 apart.

    Mutation: a scale for 240.
    """
    layer = FP8Linear(linear([[4.48, -2.24, 4.27, 4.33], [0.0, 0.0, 0.0, 0.0]]))
    expected = torch.tensor([[4.48, -2.24, 4.16, 4.48], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(layer.restore(torch.float32), expected, rtol=1e-6, atol=0)


PUBLISHED = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""NF4's values as QLoRA prints them, appendix E, rounded."""


def test_the_quantiles_are_the_published_ones():
    """Mutation: as many values below 0 as above."""
    torch.testing.assert_close(nf4_quantiles(), torch.tensor(PUBLISHED), rtol=0, atol=3e-7)


def test_a_matrix_that_fills_no_block():
    """Three rows of seven: 21 weights in one block of 64.

    Mutation: a row of blocks for each row of the matrix.
    """
    torch.manual_seed(0)
    plain = nn.Linear(7, 3)
    layer = NF4Linear(plain)
    assert layer.weight.shape == (32,) and layer.scale.shape == (1, 1)
    largest = plain.weight.detach().abs().max()
    torch.testing.assert_close(
        layer.restore(torch.float32), plain.weight.detach(), rtol=0, atol=0.16 * float(largest)
    )


def test_4_bits_in_blocks():
    """Each 64 weights have a largest of their own, which is kept, as 0 is; the quantile below 1 is
    .7230 (QLoRA, appendix E).

    Mutation: blocks of another size.
    """
    rows = torch.zeros(2, 64)
    rows[0, :3] = torch.tensor([2.0, -2.0, 1.5])
    rows[1, :2] = torch.tensor([0.5, 0.36])
    layer = NF4Linear(linear(rows.tolist()))
    restored = layer.restore(torch.float32)
    assert restored[0, :2].tolist() == [2, -2] and restored[1, 0] == 0.5
    assert float(restored[0, 2]) == pytest.approx(2 * 0.72295684, rel=1e-5)
    assert float(restored[1, 1]) == pytest.approx(0.5 * 0.72295684, rel=1e-5)
    assert not restored[:, 3:].any()


@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)])
def test_normal_weights_stay_near(kind, largest):
    """The error over the weights' size, which is that of the format and not far below.

    Mutation: the fewest bits for every kind.
    """
    torch.manual_seed(0)
    layer = nn.Linear(256, 128)
    layer.weight.data.normal_()
    restored = KINDS[kind](layer).restore(torch.float32)
    error = float((restored - layer.weight.detach()).norm() / layer.weight.detach().norm())
    assert largest / 4 < error < largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_restored_weights(kind, dtype):
    """Nothing of a matrix's size is kept for the backward pass, whose gradient is the product with
    the same matrix; passes with and without gradients are equal bitwise.

    Mutation: multiply by the transposed matrix, or leave the bias out.
    """
    torch.manual_seed(0)
    plain = nn.Linear(128, 64).to(dtype)
    layer = KINDS[kind](plain)
    plain.weight.data = layer.restore(dtype)
    x = torch.randn(3, 5, 128, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value), lambda _: _):
        output = layer(x)
    assert not kept
    assert torch.equal(output, plain(x))
    with torch.no_grad():
        assert torch.equal(output, layer(x))
    ascent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, x, ascent)
    (expected,) = torch.autograd.grad(plain(x), x, ascent)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_blocks_alone_are_quantised(kind):
    """Mutation: quantise the first and last layers as well, or none."""
    torch.manual_seed(0)
    network = Network().requires_grad_(False)
    x = torch.randn(4, 32)
    before = network(x)
    quantize(network, kind)
    kinds = {name: type(module) for name, module in network.named_modules() if "." in name}
    assert sum(found is KINDS[kind] for found in kinds.values()) == 4
    assert type(network.first) is type(network.last) is nn.Linear
    assert is_quantized(network) and not is_quantized(Network())
    assert not torch.equal(network(x), before)
    torch.testing.assert_close(network(x), before, rtol=0.2, atol=0.05)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4)])
def test_a_network_without_values_has_as_many_bytes(kind, bits):
    """As a plan counts them: those of a network with values.

    Mutation: leave the scales out on the meta device.
    """

    def size(network):
        return sum(value.nbytes for value in (*network.parameters(), *network.buffers()))

    with torch.device("meta"):
        planned = Network()
    real = Network()
    quantize(planned, kind)
    quantize(real, kind)
    scales = 4 * (64 * 64 // 64 if kind == "nf4" else 64)
    constants = 256 * 2 * 4 if kind == "nf4" else 0
    blocks = 4 * (64 * 64 * bits // 8 + scales + constants + 64 * 4)
    ends = 4 * (32 * 64 + 64 + 64 * 32 + 32)
    assert size(planned) == size(real) == blocks + ends
    x = torch.empty(4, 32, device="meta", requires_grad=True)
    planned(x).sum().backward()
    assert x.grad.shape == x.shape


def test_what_cannot_be_quantised_is_said():
    """Mutation: quantise nothing in silence, or train all weights of which some have few bits."""
    with pytest.raises(
        UserError, match=r"model\.quantization=int8: a Linear has no list of blocks"
    ):
        quantize(nn.Linear(4, 4), "int8")
    with pytest.raises(UserError, match="has no list of blocks, whose layers"):
        quantize(nn.Sequential(nn.ModuleList([nn.GELU()])), "int8")
    network = Network()
    quantize(network, "int8")
    with pytest.raises(UserError, match="quantised ones cannot be trained"):
        Full(dtype="float32").attach(network, seed=0)
