"""The command `flowrl`: what it lists, what it refuses, and how it calls and names its programs."""

import subprocess
import sys
from pathlib import Path

import pytest

from flowrl.__main__ import overview, refuse
from flowrl.cli import PROGRAMS
from flowrl.cli.arguments import PARSERS
from flowrl.cli.parser import as_subcommands, make_parser
from flowrl.errors import UserError
from flowrl.launch.foreign_jobs import check_sweep
from flowrl.runs import command_line
from flowrl.runs.command_line import resume_command, tool_command
from flowrl.runs.installation import COMMAND, CONF, PACKAGE, find_repository
from flowrl.sweep.job import command
from flowrl.sweep.plan import Sweep


@pytest.fixture
def called(monkeypatch):
    """Let this process be one that `flowrl NAME` has begun."""

    def call(name):
        monkeypatch.setattr(sys, "argv", [str(PACKAGE / "cli" / f"{name}.py")])

    return call


def flowrl(*words, cwd):
    """Call the command in another folder."""
    line = [sys.executable, "-m", "flowrl", *words]
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True)


def test_each_program_has_a_line_a_module_and_a_door(root):
    """Mutation: leave one of them out."""
    modules = {path.stem for path in (root / "flowrl" / "cli").glob("*.py")}
    shared = {"__init__", "arguments", "memory_plan", "parser", "plan_costs", "plan_division"}
    shared |= {"plan_direct", "plan_teachers", "plan_work"}
    assert modules - shared == set(PROGRAMS)
    lines = overview().splitlines()
    for name, (script, about) in PROGRAMS.items():
        assert f"  flowrl {name:<9} {about}" in lines
        if not script:
            continue
        place = root / script if name == "train" else root / "scripts" / script
        assert place.is_file()
        if name != "train":
            assert f"from flowrl.cli.{name} import main" in place.read_text()
    assert max(map(len, lines)) <= 80


def test_the_command_alone_lists_and_loads_nothing_heavy(tmp_path):
    """Mutation: import a program to list it, or list on standard error."""
    code = (
        "import runpy, sys; sys.argv = ['flowrl']\n"
        "try: runpy.run_module('flowrl', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print(end.code, {'torch', 'hydra', 'pydantic'} & {*sys.modules})"
    )
    line = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == f"{overview()}\n0 set()\n", done.stderr
    assert flowrl("--help", cwd=tmp_path).stdout == f"{overview()}\n"


def test_packages_that_nobody_needs_are_not_asked_for(tmp_path):
    """bitsandbytes, where it is installed, does on some processors, at every start.

    Mutation: let it warn.
    """
    code = (
        "import flowrl, logging\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('install kernels')\n"
    )
    line = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_server_without_its_packages_says_so_at_once(tmp_path):
    """Mutation: import PyTorch first, which takes seconds."""
    code = (
        "import runpy, sys; sys.argv = ['flowrl', 'serve', 'reward=shapes']\n"
        "sys.modules['uvicorn'] = None\n"
        "try: runpy.run_module('flowrl', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    line = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"}
    env["OMP_WAIT_POLICY"] = "PASSIVE"  # or a busy machine would be told of
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    told = "error: uvicorn is not installed: pip install 'flowrl-lightning[serve]'\n"
    assert (done.stdout, done.stderr) == ("1 False\n", told)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("evalute", "did you mean 'evaluate'?.*choose one of train, evaluate"),
        ("seed=1", "as in: flowrl train seed=1"),
        ("-m", "as in: flowrl train -m"),
        ("--hlep", "did you mean '--help'?"),
    ],
)
def test_what_is_no_subcommand_is_answered(word, message):
    """Mutation: hand it to a program."""
    with pytest.raises(UserError, match=message):
        refuse(word)


def test_help_shows_the_program_as_it_was_called(called, monkeypatch):
    """Mutation: tell who has no scripts/ to call one."""
    examples = "    python scripts/serve_reward.py reward=shapes\n    python train.py seed=1"
    text = f"x\n\n{examples}\n\ny"
    monkeypatch.setattr(sys, "argv", ["scripts/serve_reward.py"])
    as_script = make_parser("serve", text)
    assert (as_script.prog, as_script.description) == ("serve_reward.py", "x\n\ny")
    assert as_script.examples == examples
    called("serve")
    parser = make_parser("serve", text)
    assert parser.prog == "flowrl serve"
    assert parser.examples == "    flowrl serve reward=shapes\n    flowrl train seed=1"
    assert as_subcommands("see scripts/report.py") == "see flowrl report"


def test_jobs_of_the_command_are_started_by_its_name(tmp_path):
    """Python would take the modules beside a script for packages. Mutation: call the file."""
    assert command(["seed=1"], COMMAND) == [sys.executable, "-m", "flowrl", "train", "seed=1"]
    mine = tmp_path / "train.py"
    assert command(["seed=1"], mine) == [sys.executable, str(mine), "seed=1"]


def test_printed_commands_are_the_ones_that_were_called(called, monkeypatch):
    """`flowrl` where a shell finds the one of this Python. Mutation: name train.py, which is not
    there.
    """
    monkeypatch.setattr(command_line, "interpreter", lambda: "python")
    monkeypatch.setattr(command_line.shutil, "which", lambda name: f"/nowhere/{name}")
    called("train")
    assert resume_command("x") == "python -m flowrl train resume=x"
    here = Path(sys.executable).parent
    monkeypatch.setattr(command_line.shutil, "which", lambda name: str(here / name))
    assert resume_command("x", is_sweep=True) == "flowrl train -m resume=x"
    assert tool_command("report", "report.py", "my runs") == "flowrl report 'my runs'"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert tool_command("report", "report.py", "x") == "python scripts/report.py x"
    monkeypatch.setattr(command_line, "REPOSITORY", None)
    assert tool_command("report", "report.py", "x") == "flowrl report x"


def test_an_installed_package_holds_its_configuration(tmp_path, monkeypatch):
    """A folder `conf` beside an installed package is a stranger's. Mutation: look beside it first,
    or for train.py.
    """
    assert find_repository() == PACKAGE.parent and PACKAGE.parent / "conf" == CONF
    monkeypatch.setattr("flowrl.runs.installation.PACKAGE", tmp_path / "flowrl")
    (tmp_path / "conf").mkdir()
    assert find_repository() == tmp_path
    (tmp_path / "flowrl" / "conf").mkdir(parents=True)
    assert find_repository() is None


def test_a_sweep_names_no_directory_to_look_for_code(tmp_path, monkeypatch):
    """Python looks there for any module of a job that is called by name. Mutation: start it
    there.
    """
    folder = tmp_path / "sweep"
    other = tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
    monkeypatch.chdir(other)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)  # OpenCV leaves an empty entry there
    check_sweep(folder, Sweep(COMMAND, other, (("seed=1",),)), COMMAND)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="in which Python looks for code; continue it from there"):
        check_sweep(folder, Sweep(COMMAND, other, (("seed=1",),)), COMMAND)
    script = tmp_path / "train.py"
    check_sweep(folder, Sweep(script, other, (("seed=1",),)), script)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("evaluate base --seed=1", "--seed=1: overrides have no dashes; write seed=1"),
        ("evaluate base --seed 1", "--seed 1: overrides have no dashes; write seed=1"),
        ("doctor --reward ocr", "--reward ocr: overrides have no dashes; write reward=ocr"),
        ("serve -reward=ocr", "-reward=ocr: overrides have no dashes; write reward=ocr"),
        ("generate --promt x", "--promt: no such flag; did you mean --prompt?"),
        ("runs --jsn", "--jsn: no such flag; did you mean --json?"),
        ("report outputs --hlep", "--hlep: no such flag; did you mean --help?"),
        ("study plan --seed=1", "--seed=1: no such flag; see flowrl study --help"),
        ("serve port 8000", "port 8000: write port=8000"),
        ("doctor reward ocr", "reward ocr: write reward=ocr"),
        ("plan sampler = cps", "sampler = cps: an override has no spaces; write sampler=cps"),
        (
            "push outputs/latest",
            "the following arguments are required: ORG/NAME; see flowrl push --help",
        ),
        (
            "export lora.safetensors --format peft cps",
            "cps: an override has the form KEY=VALUE; write loss=cps",
        ),
    ],
)
def test_a_slip_in_any_program_is_answered_as_trains_are(line, answer, monkeypatch):
    """Mutation: leave it to argparse, which prints its usage."""
    name, *words = line.split()
    monkeypatch.setattr(sys, "argv", ["flowrl"])
    with pytest.raises(UserError) as refusal:
        PARSERS[name]().parse_intermixed_args(words)
    assert str(refusal.value) == answer


@pytest.mark.parametrize(
    "line",
    [
        "evaluate base outputs/latest seed=1 --shown 4 --out=x",
        "doctor reward=ocr --max 2 --pairs text size",
        "check -m loss=grpo,dppo ~logger --config-dir conf name=",
        "export lora.safetensors --format peft model=sd35_medium",
        "generate model=sd35_medium --prompt a --prompt b",
        "doctor --max-seconds -1 reward=ocr",
        "plan --gpu 16,24 loss=dppo",
    ],
)
def test_what_a_program_takes_is_let_through(line):
    """Mutation: take a shortened flag, or a flag's value, for a slip."""
    name, *words = line.split()
    PARSERS[name]().parse_intermixed_args(words)
