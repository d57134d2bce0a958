"""What the tests of every loss share."""

import copy

import pytest
from each_loss import CASES, method


@pytest.fixture(params=CASES, ids=" ".join)
def algorithm(request):
    """A method of its own for each test, so that a loss's state is, too."""
    return copy.deepcopy(method(*request.param))
