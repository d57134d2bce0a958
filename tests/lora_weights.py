"""LoRA weights of a small FLUX.1 transformer, by hand."""

import torch
from diffusers import FluxTransformer2DModel
from tiny import FAMILIES

from flowrl.runs import checkpoint
from flowrl.tuning.lora_file import LoRAFile

FORMATS = ("diffusers", "peft", "comfy")
LAYERS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_v")


def network():
    torch.manual_seed(0)
    return FluxTransformer2DModel(**FAMILIES["flux1"].transformer).eval()


def given(layers=LAYERS, rank=4, alpha=12.0, width=32):
    torch.manual_seed(1)
    return LoRAFile(
        {name: torch.randn(rank, width) for name in layers},
        {name: torch.randn(width, rank) for name in layers},
        dict.fromkeys(layers, alpha),
    )


def mixed():
    """Two layers of ranks 4 and 2, scaled by 3 and by 1/2."""
    one, other = given(LAYERS[:1], rank=4, alpha=12.0), given(LAYERS[1:], rank=2, alpha=1.0)
    return LoRAFile(one.a | other.a, one.b | other.b, one.alpha | other.alpha)


def checkpoint_of(run, weights):
    """A run's newest checkpoint, which names the adapter and tells no alpha."""
    tensors = {f"{name}.lora_A.policy.weight": value for name, value in weights.a.items()}
    tensors |= {f"{name}.lora_B.policy.weight": value for name, value in weights.b.items()}
    return checkpoint.save(
        run / "checkpoints", keep=1, weights={"ema": tensors}, state={"num_iterations": 3}
    )
