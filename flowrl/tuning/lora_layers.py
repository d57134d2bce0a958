"""Linear layers with a LoRA whose products are computed otherwise than peft computes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import peft.tuners.lora
import torch
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from flowrl.errors import UserError

Compute = Literal["adapter", "base_dtype", "merged"]
"""How a layer with weight W and a LoRA of matrices A and B and scale s = alpha / rank computes its
output.

`adapter` adds s B (A x) in float32, as peft does. `base_dtype` computes both products in the dtype
of the base's output, the second one with scale and addition in one pass. `merged` computes one
product with W + s B A.
"""


def set_compute(config: LoraConfig, compute: Compute) -> None:
    """Have the linear layers of peft's configuration computed this way."""
    if compute == "adapter":
        return
    kind = {"base_dtype": BaseDtypeLinear, "merged": MergedLinear}[compute]
    # The door that peft gives for layers of one's own.
    config._register_custom_module({nn.Linear: kind})


def check_compute(compute: Compute, layers: Iterable[nn.Linear]) -> None:
    """Raise UserError where the base's weights, or a product's operands, have too few bits to hold
    the sum with a LoRA.
    """
    if compute != "merged":
        return
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        raise UserError(
            f"lora.compute=merged needs matmul_precision=highest: with {precision} a product "
            "rounds the sum of both weights, and most of a small LoRA with it"
        )
    for layer in layers:
        kind = layer.weight.dtype
        if kind != torch.float32:
            raise UserError(
                "lora.compute=merged needs a base in float32, and this one has some weights in "
                f"{str(kind).removeprefix('torch.')}, in which most of a small LoRA is rounded "
                "away; set lora.compute=base_dtype"
            )


class _OwnLinear(peft.tuners.lora.Linear):
    """A linear layer with one LoRA, without dropout, that a subclass computes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for inputs [..., in]: [..., out]."""
        if self.disable_adapters:
            return self.base_layer(x)
        (name,) = self.active_adapters
        a, b = (cast(nn.Linear, matrices[name]).weight for matrices in (self.lora_A, self.lora_B))
        return self.adapted(x, a, b, self.scaling[name])

    def adapted(
        self,
        x: Float[Tensor, "*N I"],
        a: Float[Tensor, "R I"],
        b: Float[Tensor, "O R"],
        scale: float,
    ) -> Float[Tensor, "*N O"]:
        """Return the output with the LoRA."""
        raise NotImplementedError


class BaseDtypeLinear(_OwnLinear):
    """A layer whose LoRA is multiplied in the dtype of the base's output.

    The matrices stay in float32 and are cast at each call, so that they and their gradients are
    rounded to that dtype in each product. Beside a base in bfloat16 the layer holds nothing as long
    as the sequence in float32 for the backward pass. In float32 it computes what peft does, with
    the scale in the second product.
    """

    def adapted(
        self,
        x: Float[Tensor, "*N I"],
        a: Float[Tensor, "R I"],
        b: Float[Tensor, "O R"],
        scale: float,
    ) -> Float[Tensor, "*N O"]:
        y = self.base_layer(x)
        low = functional.linear(x.to(y.dtype), a.to(y.dtype))
        sums = torch.addmm(_rows(y), _rows(low), b.to(y.dtype).t(), alpha=scale)
        return sums.view_as(y)


class MergedLinear(_OwnLinear):
    """A layer that multiplies once, with the sum of its weight and its LoRA's product.

    The sum is made anew in the backward pass, so that neither it nor its gradient, both as large as
    the weight, is held.
    """

    def adapted(
        self,
        x: Float[Tensor, "*N I"],
        a: Float[Tensor, "R I"],
        b: Float[Tensor, "O R"],
        scale: float,
    ) -> Float[Tensor, "*N O"]:
        base = self.base_layer
        y: Tensor = _Merged.apply(x, base.weight, base.bias, a, b, scale)
        return y


class _Merged(torch.autograd.Function):
    """The product x W'^T + bias with W' = W + s B A, whose gradient G at the output gives

    x: G W', A: s (G B)^T x, B: s G^T (x A^T).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return functional.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        scale = ctx.scale
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ torch.addmm(weight, b, a, alpha=scale)
        outputs, inputs = _rows(gradient), _rows(x)
        of_a = scale * ((outputs @ b).t() @ inputs)
        of_b = scale * (outputs.t() @ (inputs @ a.t()))
        return of_x, None, None, of_a, of_b, None


def _rows(values: Float[Tensor, "*N D"]) -> Float[Tensor, "M D"]:
    """Return the values as rows, whatever the axes before the last."""
    return values.reshape(-1, values.shape[-1])
