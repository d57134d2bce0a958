"""A frozen transformer's blocks are held in fewer bits, so that a LoRA is trained beside a base
that does not fit its GPU otherwise.

`int8` and `fp8` (e4m3) round each weight to 8 bits after division by its row's largest over the
format's, both symmetric. `nf4` is the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, arXiv
2305.14314), in blocks of 64 weights.

Layers are put in place after a network has been loaded, and not by diffusers' quantisers as it
loads. bitsandbytes computes passes without gradients by other kernels than passes with them, so
that an update need not reproduce its rollout, and diffusers wants a GPU for it; torchao's weights
are restored before autograd sees the product, which then keeps them until the backward pass. Here
both passes take the weights back to the network's dtype and multiply alike.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from flowrl.errors import UserError
from flowrl.values.bounds import Quantization

BLOCK = 64
"""The number of weights that share one of NF4's scales."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with the weights of another one in fewer bits, and its bias.

    `weight` holds the bits, in a layout of the kind's own, and `scale` what they are multiplied by,
    in float32.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make weights
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.bias = layer.bias
        weight, scale = self.compress(layer.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def compress(self, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        """Return a matrix's bits and scales."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it compresses")

    def restore(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the matrix in a dtype, rounded once more by it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it restores")

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        product: Tensor = _Product.apply(x, self)
        return product


class _Product(torch.autograd.Function):
    """A layer's output, and the gradient with respect to its input; the matrix itself, which
    autograd would keep until the backward pass, is restored again there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.restore(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.restore(gradient.dtype), None


class Int8Linear(QuantizedLinear):
    """Whole numbers from -127 to 127, and a scale a row."""

    def compress(self, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        scale = _row_scale(weight, 127.0)
        return (weight / scale).round().to(torch.int8), scale

    def restore(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        # The product of whole numbers and a float32 scale is of float32.
        return (self.weight * self.scale).to(dtype)


class FP8Linear(QuantizedLinear):
    """Floating point with 4 bits of exponent and 3 of mantissa, and a scale a row."""

    def compress(self, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        scale = _row_scale(weight, torch.finfo(torch.float8_e4m3fn).max)
        # As plain bytes, since not every collective operation takes the format.
        return (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale

    def restore(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return (self.weight.view(torch.float8_e4m3fn).float() * self.scale).to(dtype)


class NF4Linear(QuantizedLinear):
    """The nearest of 16 quantiles of a normal distribution, two weights a byte, and a scale for
    each block of 64 weights in row order.
    """

    pairs: Float[Tensor, "256 2"]

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        quantiles = nf4_quantiles().to(layer.weight.device)
        # Both weights that a byte may hold, so that one look-up restores them.
        pairs = torch.cartesian_prod(quantiles, quantiles)
        self.register_buffer("pairs", pairs, persistent=False)

    def compress(self, weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor]:
        quantiles = nf4_quantiles().to(weight.device)
        weights = weight.float().flatten()
        blocks = functional.pad(weights, (0, -len(weights) % BLOCK)).view(-1, BLOCK)
        scale = _row_scale(blocks, 1.0)
        middles = (quantiles[1:] + quantiles[:-1]) / 2
        numbers = torch.bucketize(blocks / scale, middles).to(torch.uint8).view(-1, 2)
        return numbers[:, 0] * 16 + numbers[:, 1], scale

    def restore(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        blocks = functional.embedding(self.weight.int(), self.pairs).view(-1, BLOCK)
        # In place: an intermediate result of twice the matrix's size is enough.
        weights = blocks.mul_(self.scale).flatten()[: self.out_features * self.in_features]
        return weights.view(self.out_features, self.in_features).to(dtype)


def nf4_quantiles() -> Float[Tensor, "16"]:
    """Return NF4's values, in rising order and float32, with -1, 0 and 1 among them: quantiles of
    the standard normal distribution over their largest, seven below 0 and eight above (QLoRA,
    appendix E, and its published code for the share of the outermost).
    """
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    halves = [
        torch.special.ndtri(torch.linspace(outermost, 0.5, number, dtype=torch.float64))[:-1]
        for number in (8, 9)
    ]
    zero = torch.zeros(1, dtype=torch.float64)
    values = torch.cat([-halves[0], zero, halves[1].flip(0)])
    return (values / values.max()).float()


KINDS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "fp8": FP8Linear, "nf4": NF4Linear}
"""The layers by the values of `model.quantization`."""


def _row_scale(weight: Float[Tensor, "out in"], largest: float) -> Float[Tensor, "out 1"]:
    """Return what takes each row's largest weight to `largest`; 1 for a row of zeros."""
    scale = weight.float().abs().amax(1, keepdim=True) / largest
    return torch.where(scale > 0, scale, 1.0)


@torch.no_grad()
def quantize(network: nn.Module, kind: Quantization) -> None:
    """Quantise the linear layers of a network's blocks in place, also on the meta device, where
    they have no values.

    What lies outside of blocks, which embeds time and text and makes the output, is a small share
    and stays as it is. Raises UserError for a network without lists of blocks that have linear
    layers.
    """
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]
    for blocks in lists:
        for parent in list(blocks.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear:
                    setattr(parent, name, KINDS[kind](layer))
    if not is_quantized(network):
        raise UserError(
            f"model.quantization={kind}: a {type(network).__name__} has no list of blocks, whose "
            "layers would be quantised; set it to null"
        )


def is_quantized(network: nn.Module) -> bool:
    """Tell whether some of a network's layers are quantised, which cannot be trained themselves."""
    return any(isinstance(module, QuantizedLinear) for module in network.modules())
