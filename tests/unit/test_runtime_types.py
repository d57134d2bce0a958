"""The tests check the types of what they call, whether its package names shapes or not."""

import pytest
import runtime_types
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from flowrl.gaussian import mean_square
from flowrl.runs.files import file_digest
from flowrl.values.wording import meant


def test_every_package_is_checked_but_the_shapes_world(root):
    """Mutation: leave out those without shapes."""
    shaped, plain = runtime_types.packages(root / "flowrl")
    assert {"flowrl.gaussian", "flowrl.losses", "flowrl.models"} <= set(shaped)
    assert {"flowrl.launch", "flowrl.runs", "flowrl.values"} <= set(plain)
    stems = {path.stem for path in (root / "flowrl").iterdir() if path.suffix != ".typed"}
    assert len(shaped) + len(plain) == len(stems - {"__init__", "__pycache__", "shapes"})


def test_a_value_of_another_type_is_refused():
    """An argument, a result and a shape. Mutation: install either hook after the package is
    imported.
    """
    with pytest.raises(BeartypeCallHintViolation):
        file_digest("a name")
    with pytest.raises(BeartypeCallHintViolation):
        meant(1, ["one"])
    with pytest.raises(TypeCheckError):
        mean_square(torch.zeros(()))
