"""What an iteration's record makes of its metrics."""

import pytest
import torch

from flowrl.diagnostics import Diagnostics
from flowrl.training.metric_means import Clock, Record

LOG_RATIOS = {
    (0, 0): [0.0, 0.1, -0.2, 0.4],
    (0, 1): [0.3, 0.0, 0.0, 0.1],
    (1, 0): [-0.3, -0.1, 0.2, 0.2],
}
"""Of four samples at each term: number of the update, and of the step."""


def recorded(loss_inputs, size):
    """The metrics of the terms, in micro-batches of `size`."""
    record, diagnose = Record(), Diagnostics(clip=0.1, delta=0.1)
    for start in range(0, 4, size):
        for term, values in LOG_RATIOS.items():
            own = values[start : start + size]
            inputs = loss_inputs(own, [1] * size, kl=[0.05] * size)
            for name, value in diagnose(inputs, term[1]).items():
                record.add(name, value, term=term)
    return record.means()


@pytest.mark.parametrize("size", [1, 2])
def test_no_metric_depends_on_the_micro_batch(loss_inputs, size):
    """Mutation: take roots of each micro-batch, and average them."""
    assert recorded(loss_inputs, size) == pytest.approx(recorded(loss_inputs, 4), rel=1e-6)


def test_roots_are_of_each_term():
    """Squares 9 and 16 + 9, halved, of two terms: (3 + sqrt(12.5)) / 2; other metrics are means
    over all.

    Mutation: one root over all terms, or keep the name of the square.
    """
    record = Record()
    for term, squares in (((0, 0), [9.0]), ((1, 0), [16.0, 9.0])):
        for value in squares:
            record.add("trust/ratio_std_squared", value, term=term)
            record.add("trust/kl_old", value, term=term)
            record.add("trust/kl_old_max", value, term=term)
    expected = {
        "trust/ratio_std": (3 + 12.5**0.5) / 2,
        "trust/kl_old": 34 / 3,
        "trust/kl_old_max": 16,
    }
    assert record.means() == pytest.approx(expected)


def test_what_tensors_and_numbers_say_comes_in_their_order():
    """(3 + 3 * 7) / 4, (5 + 2 + 11) / 3, and the largest of 0.5 and 0.75, whatever its weight.

    Mutation: read tensors of another dtype in the place of these, or forget the weights.
    """
    record = Record()
    parameter = torch.tensor([1.0], requires_grad=True)
    record.add("loss/policy", parameter * 3, 1.0)
    record.add("reward/mean", torch.tensor(5.0, dtype=torch.float64))
    record.add("loss/policy", 7, 3.0)
    record.add("reward/mean", torch.tensor(2, dtype=torch.int64))
    record.add("reward/mean", torch.tensor(11.0, dtype=torch.float64))
    record.add("trust/kl_old_max", torch.tensor(0.5), 9.0)
    record.add("trust/kl_old_max", torch.tensor(0.75), 1.0)
    assert record.means() == {
        "loss/policy": 6.0,
        "reward/mean": 6.0,
        "trust/kl_old_max": 0.75,
    }


def test_the_host_reads_a_tensor_when_the_iteration_is_over(monkeypatch):
    """Mutation: make a number of it at once."""
    record = Record()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__float__", None)
        patched.setattr(torch.Tensor, "item", None)
        record.add("reward/mean", torch.tensor(5.0))
    assert record.means() == {"reward/mean": 5.0}


def test_a_lap_waits_for_the_gpu_alone(monkeypatch):
    """The work of three laps on a GPU is waited for three times, that of a CPU is done already.

    Mutation: wait for no device, or for any.
    """
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpu = torch.device("cuda", 0)
    for device in (gpu, torch.device("cpu"), None):
        clock = Clock(device)
        for name in ("rollout", "reward", "update"):
            clock.lap(name)
        assert list(clock.laps) == ["rollout", "reward", "update"]
    assert waited == [gpu] * 3
