"""Whole runs on a pretended GPU: nothing mixes devices, draws or counts where it must not, and the
host waits for nothing in an update's terms. Mistakes that are planted are found.
"""

import pytest
import torch
from remote import GPU, MixedDevices, Remote
from second_device import lacks, run_on, second_device
from tiny import FAMILIES

from flowrl.losses.dppo import DPPO
from flowrl.training import policy, sampling

pytestmark = pytest.mark.skipif(bool(lacks()), reason=lacks() or "nothing is missing")

SHORT = (
    "num_iterations=1",
    "batch={prompts_per_iteration: 2, group_size: 2, updates_per_iteration: 1}",
    "viewing={every: 0, num_shown: 1}",
    "evaluation={num_steps: 2, max_prompts: 1, images_per_prompt: 1, kl_samples: 1}",
)
EMBEDDED = (
    "rollout={num_steps: 4, trained: {count: 2, low: 0, high: 3}}",
    "data.prompts.count=8",
)
WAITS_OF_A_TERM = 0
"""The times that FlowRL may wait for the device in a term of an update, or copy out of pageable
memory to it, which waits too.
"""
PHASES = {
    *("rollout", "decode", "advantages", "step", "terms"),
    *("metrics", "evaluation", "checkpoint", "floor"),
}
SLOW = pytest.mark.slow
RUNS = [
    pytest.param("embedded", "lora"),
    pytest.param("embedded", "full", marks=SLOW),
    pytest.param("nft", "lora"),
    pytest.param("nft", "full", marks=SLOW),
    pytest.param("sd3", "lora", marks=SLOW),
    pytest.param("sd3", "full", marks=SLOW),
    pytest.param("flux1", "lora", marks=SLOW),
    pytest.param("flux1", "full", marks=SLOW),
    pytest.param("flux2_klein", "lora", marks=SLOW),
    pytest.param("flux2_klein", "full", marks=SLOW),
]


def overrides_of(name, folders):
    """A short run of a family's small pipeline, or of the embedded one."""
    if name == "nft":
        return ("experiment=diffusion_nft", *EMBEDDED, *SHORT)
    if name == "embedded":
        return ("experiment=flow_dppo", *EMBEDDED, *SHORT)
    return (
        "sampler=flow_sde",
        "loss=dppo",
        "penalty=mean_squared",
        *FAMILIES[name].overrides(folders[name]),
        *SHORT,
    )


@pytest.mark.parametrize(("name", "tuning"), RUNS)
def test_a_whole_run_keeps_to_its_device(name, tuning, tmp_path, request):
    """Set-up, rollout, decoding, scoring, advantages, gate, floor, update, average, evaluation and
    checkpoint. Mutation: `float` each metric of a term as it comes, or make a loss's constants by
    `new_tensor`.
    """
    folders = None
    if name in FAMILIES:
        folders = request.getfixturevalue("tiny_pipelines")
    overrides = overrides_of(name, folders)
    with second_device() as device:
        trained = run_on(device, tmp_path, f"tuning={tuning}", *overrides)
        assert trained.num_optimizer_steps == 1
        assert device.passed >= (PHASES if name == "nft" else PHASES | {"gate"})
        assert not device.told("random")
        own = [event for event in device.told("double") if not event.via]
        assert not own
        waits = device.told("wait", "upload", phase="terms")
        assert device.num_terms > 0
        assert waits.total() <= WAITS_OF_A_TERM * device.num_terms, waits


def planted(tmp_path, *, is_refused=True):
    """What a short run of the embedded model on the device says, or the refusal that ends it."""
    overrides = overrides_of("embedded", None)
    with second_device() as device:
        if not is_refused:
            run_on(device, tmp_path, *overrides)
            return device
        with pytest.raises(MixedDevices) as error:
            run_on(device, tmp_path, *overrides)
        return str(error.value)


def test_noise_that_stays_on_the_cpu_is_refused(tmp_path, monkeypatch):
    """Mutation: let operators of two devices pass."""
    monkeypatch.setattr(sampling, "on_device", lambda values, device: values)
    assert "two devices" in planted(tmp_path)


def test_advantages_that_stay_on_the_cpu_are_refused(tmp_path, monkeypatch):
    """Mutation: keep no refusal, which the trainer's way out then hides."""
    assign = policy.assign_advantages

    def assign_and_leave(policy, batches, record):
        assign(policy, batches, record)
        for batch in batches:
            batch.advantage = batch.advantage.cpu()

    monkeypatch.setattr(policy, "assign_advantages", assign_and_leave)
    told = planted(tmp_path)
    assert "two devices" in told and "losses/" in told


def test_a_float_and_a_float64_tensor_in_a_loss_are_found(tmp_path, monkeypatch):
    """Mutation: count no `_local_scalar_dense`, or no float64."""
    call = DPPO.__call__

    def slow(self, inputs):
        if inputs.advantage.is_cuda:
            assert inputs.advantage.double().mean() < torch.inf
        return call(self, inputs)

    monkeypatch.setattr(DPPO, "__call__", slow)
    device = planted(tmp_path, is_refused=False)
    assert any(not event.via for event in device.told("double", phase="terms"))
    assert device.count("wait", phase="terms") >= device.num_terms


@pytest.fixture
def device():
    with second_device() as entered:
        yield entered


def test_tensors_of_two_devices_meet_nowhere(device):
    """Except numbers beside tensors, and indices. Mutation: let a product of matrices pass."""
    there = torch.ones(2, 2, device=GPU)
    here = torch.ones(2, 2)
    assert isinstance(there, Remote) and there.device == GPU and there.is_cuda
    for mix in (
        lambda: there + here,
        lambda: there @ here,
        lambda: torch.cat([there, here]),
        lambda: here[torch.zeros(1, dtype=torch.long, device=GPU)],
        lambda: torch.randn(2, device=GPU, generator=torch.Generator()),
        lambda: there.numpy(),
    ):
        with pytest.raises(MixedDevices):
            mix()
    assert (there * torch.tensor(3.0)).tolist() == [[3, 3], [3, 3]]
    assert there[torch.tensor([0])].shape == (1, 2)


@pytest.mark.parametrize(
    ("work", "kinds"),
    [
        (lambda x: float(x[0, 0]), ["wait"]),
        (lambda x: bool(x.isfinite().all()), ["wait"]),
        (lambda x: x.cpu(), ["wait"]),
        (lambda x: x.tolist(), ["wait"]),
        (lambda x: x[x > 0], ["wait"]),
        (lambda x: x.nonzero(), ["wait"]),
        (lambda x: x.new_tensor(1.0), ["upload"]),
        (lambda x: torch.ones(2).to(x), ["upload"]),
        (lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True), []),
        (lambda x: x.double(), ["double"]),
        (lambda x: torch.rand_like(x), ["random"]),
        (lambda x: torch.where(x > 0, x.new_full((), 2.0), 0.0).sum(), []),
    ],
)
def test_what_cuda_allows_at_a_price_is_counted(device, work, kinds):
    """Mutation: count none of a kind, or what costs nothing."""
    x = torch.ones(2, 2, device=GPU)
    device.events.clear()
    work(x)
    assert [event.kind for event in device.events.elements()] == kinds


def test_numbers_and_gradients_are_those_of_the_cpu(device):
    """d/dx of mean (W x)^2, by hand: W = 2, x = 3 gives 2 W^2 x = 24. Mutation: compute nothing."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    layer.to(GPU)
    assert isinstance(layer.weight, Remote)
    x = torch.full((1, 1), 3.0, device=GPU, requires_grad=True)
    layer(x).square().mean().backward()
    assert x.grad.tolist() == [[24.0]]
    assert layer.weight.grad.tolist() == [[36.0]]
