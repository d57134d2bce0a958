"""The examples for notebooks run to their end, shortened to one iteration."""

import csv
import os
import re
import subprocess
import sys

import forks
import pytest
from runs import train

from flowrl.api import load

EXAMPLES = {
    "first_run": ("rewards before:", "before_and_now.png", "first_run/lora"),
    "own_reward": ("warmth", "warm.png"),
    "own_loss": ("beta 1: reward", "beta 10000: reward"),
}


def test_every_example_is_tried(root):
    """Mutation: add one that nothing runs."""
    assert {path.stem for path in (root / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, root, tmp_path):
    """From any folder, with its words on the terminal and its files below it, and no other noise.
    Mutation: rename what it imports.
    """
    text = (root / "examples" / f"{name}.py").read_text()
    shorter, count = re.subn(r"NUM_ITERATIONS = \d+", "NUM_ITERATIONS = 1", text)
    assert count == 1
    shorter = shorter.replace("prompts_per_iteration=8", "prompts_per_iteration=2")
    (tmp_path / "example.py").write_text(shorter)
    env = os.environ | {"PYTHONPATH": str(root)}
    if name == "first_run":  # The others' imports are the same, and are not heard in a fork.
        command = [sys.executable, "example.py"]
        process = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    else:
        process = forks.run("example.py", cwd=tmp_path, env=env)
    assert (process.returncode, process.stderr) == (0, "")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    for expected in EXAMPLES[name]:
        assert expected in process.stdout or expected in files, expected


def test_a_notebook_and_a_run_give_the_same_numbers(tmp_path):
    """Bitwise. Mutation: seed them otherwise, or divide the learning rate's course by another
    number.
    """
    words = ("debug=smoke", "num_threads=1")
    rows = load(*words).train(2)
    process = train(*words, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        others = list(csv.DictReader(file))
    assert len(rows) == len(others) == 2
    for row, other in zip(rows, others, strict=True):
        assert row.keys() <= other.keys()
        for key, value in row.items():
            assert key.startswith("perf/") or float(other[key]) == value, key
