"""The operations of a pass by hand, layer by layer."""

import pytest
import torch
from torch import nn
from torch.nn import functional


def products(modules, run):
    """The operations of a pass by hand: two for each weight of a layer and each of its outputs'
    places; in attention two for each number of the queries and each key, and as many for values.
    """
    counts = []

    def layer(module, inputs, output):
        counts.append(2 * output.numel() * module.weight[0].numel())

    def attention(query, key, value, **options):
        counts.append(4 * query.numel() * key.shape[-2])
        return torch.empty_like(query)

    layers = [module for module in modules if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [module.register_forward_hook(layer) for module in layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        run()
    for handle in handles:
        handle.remove()
    return sum(counts)
