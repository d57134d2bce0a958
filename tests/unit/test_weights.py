import pytest
import torch

from flowrl.errors import NotFinite
from flowrl.models.weights import first_not_finite, require_finite

BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_that_is_no_number(bad, dtype):
    """In the middle of the second of three, beside weights of another dtype and a counter.

    Mutation: a sum, which finite weights overflow (below), or the first tensor alone.
    """
    tensors = {
        "a": torch.ones(3),
        "step": torch.tensor(7),
        "none": torch.zeros(0),
        "b": torch.ones(5, 2, dtype=dtype),
    }
    assert first_not_finite(tensors) is None
    tensors["b"][2, 1] = bad
    tensors["c"] = torch.full((2,), torch.nan)
    assert first_not_finite(tensors) == "b"


def test_large_weights_are_numbers():
    """Their sum and their squares are not. Mutation: a norm of order 2."""
    assert (
        first_not_finite(
            {"a": torch.full((4,), 3e38), "b": torch.full((4,), 6e4, dtype=torch.float16)}
        )
        is None
    )


def test_kind_and_name_are_told():
    """Mutation: look at the weights and not at the average."""
    weights = {
        "lora": {"x.lora_A": torch.ones(2)},
        "ema": {"x.lora_A": torch.ones(2), "x.lora_B": torch.ones(2)},
    }
    require_finite(weights)
    weights["ema"]["x.lora_B"][0] = torch.nan
    with pytest.raises(NotFinite, match=r"the weight x.lora_B \(ema\) holds NaN"):
        require_finite(weights)
