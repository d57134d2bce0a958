"""What is tried before a run's first evaluation, that it changes nothing, and that a device without
memory is answered in one line.
"""

import csv
from contextlib import nullcontext

import pytest
import torch
from lightning import Trainer
from runs import make, train

from flowrl.callbacks import rehearsal
from flowrl.callbacks.checkpoint import Checkpoint
from flowrl.callbacks.rehearsal import Phase, Rehearsal, Rehearse, rehearse
from flowrl.objectives import gate
from flowrl.objectives.gate import GateFailed
from flowrl.runs.command_line import tool_command
from flowrl.training.memory import OutOfMemory, smaller_micro_batch
from flowrl.training.policy import Policy
from flowrl.training.reward import RewardModule

SMALL = ("num_threads=1", "batch.max_micro_batch=4", "num_iterations=2")
METHODS = {
    "mask with an adaptive threshold": (
        "loss=dppo",
        "loss.delta=auto",
        "loss.kl_budget=1e-4",
        "batch.inner_epochs=2",
    ),
    "forward process": ("experiment=diffusion_nft",),
    "reward gradients": ("experiment=draft",),
    "data regularisation": (
        "regularizer=shapes",
        "regularizer.images.count=8",
        "regularizer.batch=4",
    ),
}


def rows_of(policy, data, *callbacks):
    """The metrics of each iteration without its times, with these callbacks."""
    rows = []
    policy.report = rows.append
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(policy, datamodule=data)
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_a_rehearsal_leaves_no_trace_in_the_numbers(method):
    """Metrics and weights are bitwise those without it. Mutations: keep the gradients, or step."""
    results = []
    for is_rehearsed in (False, True):
        policy, data, evaluator = make(*SMALL, *METHODS[method])
        callbacks = [Rehearse(evaluator=evaluator, every=1)] if is_rehearsed else []
        rows = rows_of(policy, data, *callbacks)
        results.append((rows, {k: v.tolist() for k, v in policy.tuning.parameters().items()}))
    assert results[0] == results[1]


def test_a_run_says_what_it_will_take_before_its_first_evaluation(tmp_path):
    """And a resumed one goes on at once. Mutation: rehearse after the evaluation, or anew."""
    settings = ("debug=smoke", "rehearsal=true", "num_threads=1", "evaluation.max_prompts=2")
    folder = f"run_dir={tmp_path / 'run'}"
    result = train(*settings, folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    first = lines.index("rehearsing one piece of every phase")
    words = [line.split()[0] for line in lines[first + 1 : first + 5]]
    assert words == ["rollout", "gate", "update", "evaluation"]
    assert "the run of 2 and 3 of them" in lines[first + 5]
    assert first < lines.index("evaluating the model as it is")
    again = train(f"resume={tmp_path / 'run'}", "num_iterations=3", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "rehearsing" not in again.stdout
    table = (tmp_path / "run" / "metrics.csv").read_text()
    assert [row["iteration"] for row in csv.DictReader(table.splitlines())] == ["1", "2", "3"]


def test_times_are_those_of_all_pieces():
    """Two evaluations and ten iterations of 8 s and 60 s. Mutation: count one evaluation."""
    told = Rehearsal([Phase("gate", "4 samples", 0.25, 1.5)], 60.0, 8.0).describe(10, 2)
    assert told == [
        "gate       4 samples: 0.25 s, 1.50 GiB at most",
        "at this pace an iteration takes 60.0 s, an evaluation 8.0 s, and the run of 10 and 2 of "
        "them 10 min; first calls are the slowest",
    ]


def by_turned_clock(monkeypatch, policy, data, evaluator):
    """What a rehearsal finds where each look at the clock is a second after the one before."""
    ticks = iter(range(100))
    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: next(ticks))
    found = []

    class Take(Rehearse):
        def on_train_start(self, trainer, pl_module):
            found.append(rehearse(pl_module, data.iterations[0], evaluator))

    policy.training_step = lambda *_: None
    rows_of(policy, data, Take(evaluator=evaluator, every=0))
    [result] = found
    return result


def test_an_iteration_is_so_many_pieces(monkeypatch):
    """Each phase takes a second by a clock that is turned by hand: 2 micro-batches of 4 samples,
    each one second of rollout and one of every term; 16 images of evaluation in batches of 2.

    Mutation: count one term, or one micro-batch.
    """
    policy, data, evaluator = make(
        *SMALL,
        "batch.updates_per_iteration=1",
        "evaluation.max_prompts=4",
        "evaluation.batch_size=2",
    )
    assert evaluator.images_per_prompt == 2 and len(evaluator.prompts) == 8
    result = by_turned_clock(monkeypatch, policy, data, evaluator)
    num_terms = policy.objective.num_trained()
    assert [phase.what for phase in result.phases][2] == f"1 of {num_terms} terms"
    assert result.iteration_seconds == 2 * (1 + num_terms)
    assert result.evaluation_seconds == 16 / 2


def test_passes_over_real_images_count(monkeypatch):
    """Two updates of four images at each sigma, in micro-batches of four, a second each.

    Mutation: leave them out, count one, or keep their gradients.
    """
    words = ("evaluation.max_prompts=2", *METHODS["data regularisation"])
    policy, data, evaluator = make(*SMALL, *words)
    result = by_turned_clock(monkeypatch, policy, data, evaluator)
    num_terms = policy.objective.num_trained()
    assert [phase.name for phase in result.phases][2:4] == ["update", "data"]
    assert result.phases[3].what == "4 real images"
    assert result.iteration_seconds == 2 * (1 + num_terms) + 2 * num_terms
    assert all(parameter.grad is None for parameter in policy.tuning.parameters().values())


def empty(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore about it")


PLANTED = {
    "rollout": (lambda policy: setattr(policy.model, "decode", empty), "batch.max_micro_batch=2"),
    "update": (lambda policy: setattr(policy.objective, "term", empty), "batch.max_micro_batch=2"),
    "gate": (
        lambda policy: setattr(policy.objective, "check_gate", empty),
        "batch.max_micro_batch=2",
    ),
    "scorer": (lambda policy: setattr(policy.reward, "reward", empty), "reward.batch_size"),
}


@pytest.mark.parametrize("phase", PLANTED)
def test_no_memory_is_answered_before_the_first_evaluation(phase):
    """With the phase and what to do, in one line. Mutation: take it for a missing reward."""
    plant, remedy = PLANTED[phase]
    policy, data, evaluator = make(*SMALL)
    plant(policy)
    with pytest.raises(OutOfMemory) as error:
        rows_of(policy, data, Rehearse(evaluator=evaluator, every=0))
    text = str(error.value)
    assert text.startswith(f"out of memory in the {phase}: ") and remedy in text
    assert "Tried to allocate 2 GiB." in text and "\n" not in text
    assert f"{tool_command('plan', 'plan_memory.py')} says what fits" in text


def test_a_batch_of_the_evaluation_that_does_not_fit_says_so(monkeypatch):
    """Mutation: name the rollout's key."""
    policy, data, evaluator = make(*SMALL)
    monkeypatch.setattr(evaluator, "draw", empty)
    with pytest.raises(OutOfMemory, match=r"in the evaluation: set evaluation\.batch_size"):
        rows_of(policy, data, Rehearse(evaluator=evaluator, every=0))


def test_a_gate_that_does_not_hold_is_told_with_what_would_mend_it():
    """Before the first evaluation. A rollout by PyTorch's plain attention passes here, another one
    is off by a thousandth, and kernels that a CPU has not are left out.

    Mutations: leave the gate to the first iteration, or try no other setting.
    """
    policy, data, evaluator = make(*SMALL)
    policy.training_step = lambda *_: None
    kernels = torch.backends.cuda

    def check(batch):
        if kernels.flash_sdp_enabled():
            raise GateFailed("step 0: moved", 1e-3)

    policy.objective.check_gate = check
    with pytest.raises(GateFailed) as error:
        rows_of(policy, data, Rehearse(evaluator=evaluator, every=0))
    assert str(error.value) == (
        "step 0: moved; drift with backend.attention=_native_flash 1.0e-03, "
        "backend.attention=_native_math none; choose what leaves none, set backend.compile=false "
        "where blocks are compiled, or raise gate_tolerance, to a tenth of the threshold at most"
    )
    assert error.value.drift == 1e-3
    assert kernels.flash_sdp_enabled() and kernels.cudnn_sdp_enabled()


@pytest.mark.parametrize(("phase", "is_saved"), [("decode", True), ("step_weights", False)])
def test_what_memory_cuts_short_is_saved_where_no_weight_has_moved(
    phase, is_saved, tmp_path, monkeypatch
):
    """The second iteration has no memory, in its rollout or after its first optimizer step.

    Mutation: save in any case, or never.
    """
    policy, data, _ = make(*SMALL)
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, trainer, policy: saved.append(1))
    from flowrl.callbacks.record import RunRecord
    from flowrl.callbacks.stop import Stop

    record = RunRecord(folder=str(tmp_path))
    saver = Checkpoint(record=record, stop=Stop(), folder=str(tmp_path), every=100, keep=1)
    whole = Policy.training_step

    def step(batch, *others):
        if batch.iteration == 1:
            if phase == "decode":
                policy.model.decode = empty
            else:
                monkeypatch.setattr("flowrl.training.policy.step_weights", empty)
        whole(policy, batch, *others)

    policy.training_step = step
    with pytest.raises(OutOfMemory, match="out of memory in the"):
        rows_of(policy, data, record, saver)
    assert bool(saved) == is_saved


def test_the_smallest_micro_batch_has_another_remedy():
    """Mutation: propose a micro-batch of 0."""
    policy, _, _ = make("num_threads=1", "batch.max_micro_batch=1")
    assert "gradient_checkpointing" in smaller_micro_batch(policy.plan)


def test_a_gate_explained_without_memory_is_no_missing_kernel():
    """Mutation: leave such a setting out, as one that this machine does not have."""
    with pytest.raises(torch.OutOfMemoryError):
        gate.explain(GateFailed("drift", 1.0), [("backend.attention=math", nullcontext())], empty)


def test_a_scorer_without_memory_is_no_missing_reward():
    """Neither is a half of its call. Mutation: catch it as any other failure."""
    module = RewardModule(reward=empty, max_missing=1.0)
    with pytest.raises(torch.OutOfMemoryError):
        module.score(torch.zeros(2, 3, 2, 2), [])
