"""The Makefile: what it installs for which target, and how it passes words on."""

import ast
import re
import subprocess
import sys

import pytest
from runs import ROOT

MAIN = "experiment=diffusion_nft_fast"


def make(*words, **options):
    """What make would run, line by line."""
    command = ["make", "--dry-run", "--no-print-directory", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """What `make test ARGS=...` was told is not for the make of these tests."""
    monkeypatch.delenv("MAKEFLAGS", raising=False)


@pytest.fixture
def installed(tmp_path):
    """An environment that somebody else has made."""
    for stamp in (".dev", ".installed"):
        (tmp_path / stamp).touch()
    return f"VENV={tmp_path}"


def test_words_behind_train_are_overrides(installed):
    """So are those in ARGS, which come first, as flags must. Mutation: ignore them."""
    (line,) = make("train", installed, "sampler=cps", "loss.delta=1e-6,1e-5", "ARGS=-m seed=0,1")
    _, _, words = line.partition("train.py ")
    first, *others = re.split(r" (?=')", words)
    assert first == "-m seed=0,1"
    assert sorted(others) == ["'loss.delta=1e-6,1e-5'", "'sampler=cps'"]
    (line,) = make("train", installed, "name=a b", "PYTHON=python3.12", "ARGS=seed=1 loss=grpo")
    assert line.endswith("train.py seed=1 loss=grpo 'name=a b'")


@pytest.mark.parametrize(
    ("words", "behind"),
    [
        ((), MAIN),
        (("ARGS=-m seed=0,1",), f"{MAIN} -m seed=0,1"),
        (("seed=1", "name=a b"), f"{MAIN} 'name=a b' 'seed=1'"),
        (("loss.beta=0.3",), f"{MAIN} 'loss.beta=0.3'"),
        (("loss=dppo", "sampler=cps"), "'loss=dppo' 'sampler=cps'"),
        (("experiment=flow_dppo_cps",), "'experiment=flow_dppo_cps'"),
        (("ARGS=-m seed=0,1 sampler=cps",), "-m seed=0,1 sampler=cps"),
        (("ARGS=+experiment=grpo_guard",), "+experiment=grpo_guard"),
        (("resume=outputs/latest",), "'resume=outputs/latest'"),
    ],
)
def test_train_is_the_main_job_unless_told_otherwise(installed, words, behind):
    """Mutation: the main job's recipe behind another method's words, or no recipe without any."""
    (line,) = make("train", installed, *words)
    _, _, found = line.partition("train.py ")
    assert sorted(found.split()) == sorted(behind.split())


@pytest.mark.parametrize(
    "word",
    [
        "data.prompts.path=${oc.env:HOME}/a b.txt",
        "seed=${seed}",
        "name=$${x} $",
        "name=it's",
        "name=['a b', \"c\"]",
        r"data.prompts.path=C:\a\ b\\c",
        "name=a\\",
        "name=`pwd` $(pwd) # *",
        "name=${",
    ],
)
def test_a_value_reaches_the_program_as_it_was_typed(tmp_path, word):
    """Whatever make and the shell would read in it. Mutation: leave make's own marks in, or quote
    it by a single quote alone.
    """
    (tmp_path / ".installed").touch()
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!{sys.executable}\nimport sys; print(sys.argv)\n")
    python.chmod(0o755)
    command = ["make", "--silent", "--no-print-directory", "train", f"VENV={tmp_path}", word]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout)[1:] == ["train.py", MAIN, word]


def test_training_installs_no_development_tools(tmp_path):
    """Mutation: let `train` wait for `setup`."""
    fresh = f"VENV={tmp_path / 'fresh'}"
    assert "[dev]" not in "\n".join(make("train", fresh))
    lines = make("test", fresh, "CONSTRAINTS=constraints.txt")
    installs = [line.split("check ")[1] for line in lines if "pip install" in line]
    assert installs == [
        "--constraint constraints.txt --editable .",
        "--constraint constraints.txt --editable '.[dev]'",
    ]


def test_a_processor_gets_pytorchs_own_build_first(tmp_path):
    """Mutation: install the package first, which brings CUDA."""
    fresh = f"VENV={tmp_path / 'fresh'}"
    lines = make("train", fresh, "CPU=1", "TORCH_INDEX=URL")
    installs = [line.split("check ")[1].split() for line in lines if "pip install" in line]
    assert installs == [["--index-url", "URL", "torch", "torchvision"], ["--editable", "."]]
    refused = subprocess.run(
        ["make", "train", fresh, "CPU=1"], cwd=ROOT, capture_output=True, text=True
    )
    assert refused.returncode and "CPU=1 needs TORCH_INDEX=URL" in refused.stdout


def test_constraints_pin_what_is_needed():
    """Mutation: pin a build, a path, or this package itself."""
    head, *lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert head.startswith("#")
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted(pins)
    assert {"torch", "lightning", "hydra-core", "pytest", "ruff"} <= pins.keys()
    assert all(re.fullmatch(r"[\w.]+", pin) for pin in pins.values())
    assert not [name for name in pins if name.startswith("flowrl")]
