"""What the tests of every loss share."""

import copy

import pytest
from each_loss import CASES, method


@pytest.fixture(params=CASES, ids=" ".join)
def algorithm(request):
    """A method of its own for each test, so that a loss's state is, too."""
    return copy.deepcopy(method(*request.param))


@pytest.fixture(params=[case for case in CASES if case[0] != "opd"], ids=" ".join)
def rewarded(request):
    """A method whose loss follows advantages."""
    own = copy.deepcopy(method(*request.param))
    assert own.loss.needs_rewards
    return own
