"""scripts/benchmark.py: what it times, measures and profiles, on small runs."""

import gzip
import json

import pytest
import torch
from hydra.errors import InstantiationException
from runs import composed, load_script
from second_device import lacks, second_device

from flowrl.callbacks.timing import Peak
from flowrl.cli.memory_plan import Plan
from flowrl.cli.plan_costs import Costs
from flowrl.errors import UserError
from flowrl.speed import operations

SMALL = (
    "debug=smoke",
    "num_threads=1",
    "rollout={num_steps: 3, trained: {count: 1, low: 0, high: 2}}",
    "batch={prompts_per_iteration: 2, group_size: 2, updates_per_iteration: 1}",
)
LINES = [
    "1 iterations of 4 images, 1 threads; medians",
    "part seconds share",
    *(f"bare {name}" for name in ("rollout", "decode", "reward", "update", "reference")),
    "everything else",
    "iteration ",
    "first iteration (compiling, ...)",
    "images per second",
    "iteration over bare parts",
    "rollout with scoring over bare",
    "peak memory",
    "a large matrix product",
    "rollout:",
    "update:",
]
"""What a run on the CPU prints: the beginnings of its lines, in which blanks count for one."""


@pytest.fixture
def benchmark():
    return load_script("benchmark")


def begins(line, start):
    return " ".join(line.split()).startswith(start.rstrip())


def test_a_run_on_the_cpu_prints_what_records_quote(benchmark, call):
    """Of a forward-process loss too, whose updates have no stochastic steps. Mutation: print a
    GPU's or a planner's line, or leave the grid out of its updates.
    """
    status, out, err = call(benchmark, "experiment=diffusion_nft", *SMALL, "--iterations", "1")
    assert status == 0, err
    lines = out.splitlines()
    assert len(lines) == len(LINES)
    for line, start in zip(lines, LINES, strict=True):
        assert begins(line, start), line
    seconds = {line.split()[1]: float(line.split()[2]) for line in lines[2:7]}
    assert seconds["update"] > 0 and seconds["reference"] > 0


def test_a_profile_on_the_cpu(benchmark, call, tmp_path):
    """Mutation: profile nothing, or take an override behind --profile for a file."""
    path = tmp_path / "trace.json.gz"
    status, out, err = call(benchmark, *SMALL, "--profile", path)
    assert status == 0, err
    head, columns, *rows, last = out.splitlines()
    assert head.startswith("an iteration took ") and head.endswith(" without")
    assert columns.startswith("operator, itself on the CPU")
    assert sum(row.startswith("aten::") for row in rows) > 10
    assert rows[-1].startswith("in no operator (Python)")
    assert last == f"trace: {path}, for https://ui.perfetto.dev"
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"iteration", "aten::addmm"} <= names


def test_words_behind_profile(benchmark, call, tmp_path, monkeypatch):
    """Mutation: take an override for a file, or begin where the trace cannot be written."""
    called = []
    monkeypatch.setattr(benchmark, "profile_table", lambda *words: called.append(words))
    call(benchmark, "--profile", "debug=smoke", "seed=1")
    [(overrides, path)] = called
    assert overrides == ["debug=smoke", "seed=1"] and str(path) == "trace.json.gz"
    monkeypatch.undo()
    status, _, err = call(benchmark, *SMALL, "--profile", tmp_path / "none" / "trace.json")
    assert status == 1 and "no such folder" in err and err.count("\n") == 1


def test_cases_of_memory(benchmark):
    """All combinations of the values of keys with several; those of the main job without one, for
    its model alone. Mutation: pair values instead.
    """
    words = [
        "seed=1",
        "batch.group_size=2,4",
        "batch.max_micro_batch=1,2",
        "model.resolution=[4,8]",
    ]
    fixed, cases = benchmark.cases_of(words)
    assert fixed == ["seed=1", "model.resolution=[4,8]"]
    assert [tuple(case.values()) for case in cases] == [
        ("2", "1"),
        ("2", "2"),
        ("4", "1"),
        ("4", "2"),
    ]
    assert list(cases[0]) == ["batch.group_size", "batch.max_micro_batch"]
    _, cases = benchmark.cases_of(["seed=1"])
    assert cases[2] == {"rollout.num_steps": "24", "batch.group_size": "12"}
    with pytest.raises(UserError, match=r"batch\.max_micro_batch=4,8"):
        benchmark.cases_of(["model=sd35_medium"])


@pytest.mark.slow
def test_a_table_of_memory(benchmark, call):
    """A case that fails says why in its row. Mutation: end at the first that does."""
    status, out, err = call(benchmark, *SMALL, "--memory", "batch.group_size=1,4")
    assert status == 0, err
    head, refused, measured = out.splitlines()
    assert head.split() == ["group", "peak", "GiB"]
    assert "batch.group_size=1" in refused
    assert measured.split()[0] == "4" and 0.1 < float(measured.split()[1]) < 10


def test_a_peak_of_training_is_not_that_of_evaluations():
    """1 + 2 + 9 bytes, with 100 in evaluations. Mutation: add the phases up, or count those."""
    costs = Costs(fixed=1, iteration=2, rollout=3, decode=9, update=4, step=5, evaluation=100)
    assert costs.training == 12 and costs.peak == 101


def test_on_a_gpu_the_planners_number_stands_beside_the_peak(benchmark, capsys, monkeypatch):
    """That of the run's own micro-batch of 4. Mutation: predict for one row, whatever it is."""
    counted = []

    def costs(plan, rows):
        counted.append((rows, costs_of(plan, rows)))
        return counted[-1][1]

    costs_of = Plan.costs
    monkeypatch.setattr(Plan, "costs", costs)
    cfg = composed(*SMALL)
    peak = Peak()
    peak.allocated = 1.0
    benchmark.print_peak(peak, cfg)
    assert len(capsys.readouterr().out.splitlines()) == 1 and not counted
    peak.reserved = 2.0
    benchmark.print_peak(peak, cfg)
    allocated, reserved, predicted = capsys.readouterr().out.splitlines()
    assert allocated == "peak memory                       1.00 GiB"
    assert reserved == "peak memory reserved              2.00 GiB"
    [(rows, of_rows)] = counted
    gib = of_rows.training / 2**30
    assert rows == 4
    assert predicted == f"peak memory predicted             {gib:.2f} GiB (scripts/plan_memory.py)"


def test_what_the_planner_refuses_is_not_predicted(benchmark):
    """A network of a class that Hydra makes, whose refusal comes within Hydra's error; another
    error is raised. Mutation: let the refusal end the benchmark, or hide what is a fault.
    """
    cfg = composed(*SMALL, "model=qwen_image_edit_plus")
    assert benchmark.predicted_gib(cfg) is None
    cfg.model._target_ = "builtins.int"
    with pytest.raises(InstantiationException):
        benchmark.predicted_gib(cfg)


@pytest.mark.slow
@pytest.mark.skipif(bool(lacks()), reason=lacks() or "nothing is missing")
@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA Nothing"])
def test_on_a_gpu_both_yardsticks_are_named(name, benchmark, call, monkeypatch):
    """A GPU that is not known says so. Mutation: rate it as another."""
    monkeypatch.setitem(operations.SIDE, "cuda", 64)
    monkeypatch.setattr(benchmark, "predicted_gib", lambda cfg: 3.0)
    with second_device():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        status, out, err = call(benchmark, *SMALL, "matmul_precision=high", "--iterations", "1")
    assert status == 0, err
    assert "peak memory predicted             3.00 GiB (scripts/plan_memory.py)" in out
    assert " TFLOP/s, float32, matmul_precision=high" in out
    lines = [line for line in out.splitlines() if line.startswith("update:")]
    assert lines[-1].endswith(" in the run of a product measured here")
    told = " in the run of the GPU's rating (H100 SXM, 495 TFLOP/s in TF32, dense)"
    if name == "NVIDIA Nothing":
        assert f"{name}: no rating for these products is known here" in out and len(lines) == 1
    else:
        assert lines[0].endswith(told) and len(lines) == 2
