"""The door of train.py and the scripts: an interrupt ends in silence with status 130."""

import ast
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest
from runs import ROOT

from flowrl.errors import UserError
from flowrl.launch import interrupts
from flowrl.launch.build import build
from flowrl.launch.compose import compose
from flowrl.launch.errors import one_line_errors
from flowrl.launch.interrupts import heed_swallowed

PROGRAM = """
    from flowrl.launch.program import run_program

    import slow

    def main():
        print("main", flush=True)
        slow.wait()

    if __name__ == "__main__":
        raise SystemExit(run_program(main))
"""
SLOW = """
    import time

    def wait():
        time.sleep(100)

    try:
        print("importing", flush=True)
        time.sleep(IMPORT)
    except KeyboardInterrupt as error:  # as a library may turn it into another error
        raise ImportError("no") from error
"""

FINALIZER = """
    import time

    class Slow:
        def __del__(self):
            print("finalizer", flush=True)
            time.sleep(5)

    def wait():
        Slow()
        time.sleep(100)
"""


@pytest.mark.parametrize(("seconds", "moment"), [(100, "importing"), (0, "main")])
def test_an_interrupt_is_no_traceback(seconds, moment, tmp_path):
    """During imports and in `main`. Mutation: heed interrupts only once all is imported."""
    slow = textwrap.dedent(SLOW).replace("IMPORT", str(seconds))
    assert interrupted(tmp_path, moment, slow) == (130, "")


def test_an_interrupt_within_a_finalizer_is_not_lost(tmp_path):
    """Python prints an exception there and goes on. Mutation: leave it to Python."""
    assert interrupted(tmp_path, "finalizer", textwrap.dedent(FINALIZER)) == (130, "")


def interrupted(folder, moment, slow):
    """Run PROGRAM with the module `slow`, interrupt it once it prints `moment`, and return its exit
    status and what it printed to stderr.
    """
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    (folder / "slow.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # This tree, and not the one that is installed.
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.stdout.readline().strip() != moment:
        assert process.poll() is None
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, err


def test_building_heeds_a_swallowed_interrupt(monkeypatch):
    """Weights take long to load, and import much. Mutation: leave it to what comes later."""
    cfg = compose(["name=t", "debug=smoke"])
    build(cfg)
    monkeypatch.setattr(interrupts, "_noted", [signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        build(cfg)


def test_programs_import_their_door_first(root):
    """Mutation: import PyTorch before it in a script, or leave a script without it."""
    light = {"import_picture", "kill_and_resume", "mutation", "structure", "metrics_page"}
    num_programs = 0
    programs = [root / "train.py", root / "flowrl" / "__main__.py"]
    for path in (*programs, *(root / "flowrl/cli").glob("*.py"), *(root / "scripts").glob("*.py")):
        text = path.read_text()
        if 'if __name__ == "__main__"' not in text or path.stem in light:
            continue
        imports = [
            node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.parse(text).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        first = next(name for name in imports if name != "__future__")
        assert first == "flowrl.launch.program" and "run_program" in text, path
        num_programs += 1
    assert num_programs > 20


def test_an_error_that_an_interrupt_caused_is_an_interrupt(capsys):
    """A library stopped within its imports raises an error of its own. Mutation: look for
    KeyboardInterrupt among the causes, or take every error for an interrupt.
    """

    def swallow():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        raise UserError("cannot load the pipeline")

    def fail():
        raise UserError("cannot load the pipeline")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert one_line_errors(swallow) == 130
        assert capsys.readouterr().err == ""
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert one_line_errors(fail) == 1
        assert capsys.readouterr().err == "error: cannot load the pipeline\n"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_swallowed_interrupt_is_heeded_later():
    """Where a library has caught it and gone on. Mutation: heed nothing, or heed it always."""

    def swallow():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        heed_swallowed()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert one_line_errors(heed_swallowed) == 0
        assert one_line_errors(swallow) == 130
        # Of an earlier program in the same process.
        assert one_line_errors(heed_swallowed) == 0
    finally:
        signal.signal(signal.SIGINT, before)
