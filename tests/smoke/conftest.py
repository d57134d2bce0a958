"""One finished run, and a way to call scripts, shared by the smoke tests."""

import sys
from pathlib import Path

import pytest
from runs import SHORT, train_as_a_user

from flowrl.launch.errors import one_line_errors

PRINTED = "printed.txt"
"""What the run printed, beside its `outputs`."""


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a finished run of four iterations, started where outputs/ is its own."""
    place = tmp_path_factory.mktemp("finished")
    result = train_as_a_user(*SHORT, cwd=place)
    assert result.returncode == 0, result.stderr
    (place / PRINTED).write_text(result.stdout)
    return (place / "outputs" / "latest").resolve()


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's `main` as its command line would; its status, output and errors."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        status = one_line_errors(script.main)
        return status, *capsys.readouterr()

    return run
