"""Overrides and commands read back as they were meant, by Hydra, omegaconf and a shell."""

import shlex
import shutil
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flowrl.launch.compose import check_folder
from flowrl.runs.command_line import override, resume_command
from flowrl.runs.installation import TRAIN

PARSER = OverridesParser.create()
PRINTABLE = st.characters(exclude_categories=("Cs", "Cc"))
TEXTS = st.text(PRINTABLE | st.sampled_from("()=,#&'\"~[]!^${}\\: %|;*?<>"))


def read_back(text):
    """The value of an override `key=...`, as the configuration holds it."""
    return OmegaConf.create({"value": PARSER.parse_override(text).value()}).value


@settings(max_examples=500)
@given(TEXTS)
@example("a${b}")
@example(r"a\${b}\\${c}")
@example('\\"')
@example("0E0")
@example("null")
@example("True")
@example("1_000")
@example("my project (copy) é #1")
@example("line\nline")
def test_an_override_is_read_back_as_the_text(text):
    """Mutation: leave out the quotes, the doubling of backslashes, or the escape of an
    interpolation.
    """
    assert read_back(override("key", text)) == text


@settings(max_examples=200)
@given(TEXTS)
def test_a_printed_command_is_read_back_by_a_shell(text):
    """Mutation: print the override without the shell's quotes."""
    folder = f"/runs/{text}"
    words = shlex.split(resume_command(folder, is_sweep=True))
    assert words[2] == "-m" and len(words) == 4
    assert words[3].startswith("resume=") and read_back(words[3]) == folder


def test_a_shell_finds_the_interpreter_that_runs(monkeypatch, tmp_path):
    """`python` in an active environment, else its path, from here where it lies below, with the
    shell's quotes.

    Mutation: print `python` alone, which a shell without the environment lacks or has elsewhere.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TRAIN)])
    folder = tmp_path / "my env" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "python3"):
        (folder / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python3"))
    monkeypatch.setenv("PATH", f"/nowhere:{folder}")
    assert resume_command("x") == "python train.py resume=x"
    for path in ("/nowhere", "/usr/bin"):
        monkeypatch.setenv("PATH", path)
        assert resume_command("x") == "'my env/bin/python3' train.py resume=x"
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert shlex.split(resume_command("x"))[0] == str(folder / "python3")


def test_plain_folders_are_printed_plainly(monkeypatch):
    """FlowRL's script has its short name, a user's the one it was called by. Mutation: quote
    everything.
    """
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(sys, "argv", [str(TRAIN)])
    assert (
        resume_command("outputs/2026-01-01/12-00-00-x")
        == "python train.py resume=outputs/2026-01-01/12-00-00-x"
    )
    monkeypatch.setattr(sys, "argv", ["mine/train.py"])
    assert resume_command("/x") == "python mine/train.py resume=/x"


def test_a_folder_that_hydra_cannot_write_to_is_refused():
    """Hydra reads the folder's path as an interpolation. Mutation: let it raise
    InterpolationKeyError.
    """
    with pytest.raises(ValueError, match=r"run_dir=.*/a\$\{b\}.*choose another"):
        check_folder("run_dir", "a${b}")
    check_folder("run_dir", "a$b {c}")
