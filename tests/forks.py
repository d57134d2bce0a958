"""Programs and functions in forks of a process that has imported PyTorch and FlowRL: most of a
short program's time is that import.

A fork is not what a user starts. Interrupts, the first lines on a terminal, threads, and variables
that libraries read when they are imported are tested with `runs.start`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
AT_START = dict(os.environ)
IMPORTED = ("runs", "flowrl.launch.run", "flowrl.models.sd3", "flowrl.tuning.lora")
"""What the server imports: nothing there may start a thread, which a fork would lose."""
READ_AT_IMPORT = ("HF_", "OMP_", "MKL_", "TORCH_", "TRANSFORMERS_")
"""How the names of variables begin that have no effect in a fork, where they come too late."""


def context():
    """The context whose processes are forks of the server, which is started with the first call."""
    multiprocessing.set_forkserver_preload([*IMPORTED])
    # The server is not told of this process's sys.path, and would import nothing, silently. A test
    # may have changed the environment, which is none of the server's business.
    places = os.pathsep.join([str(TESTS), str(TESTS.parent), AT_START.get("PYTHONPATH", "")])
    environment = AT_START | {"PYTHONPATH": places.rstrip(os.pathsep)}
    with mock.patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def run(*words, cwd, seconds=300, env=None):
    """Run `python *words` to its end, in the folder `cwd` and the environment `env`, by default
    that of the test; the first word is a file, or `-m` before a module.
    """
    env = dict(os.environ if env is None else env)
    for name in env.keys() | AT_START.keys():
        is_late = name.startswith(READ_AT_IMPORT) and env.get(name) != AT_START.get(name)
        assert not is_late, f"{name} comes too late for a fork: start the program"
    with tempfile.TemporaryDirectory() as name:
        printed = [Path(name) / "out", Path(name) / "err"]
        for path in printed:
            path.touch()
        arguments = ([*map(str, words)], str(cwd), env, printed)
        process = context().Process(target=_run, args=arguments)
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments[0], seconds)
        status = process.exitcode
        process.close()
        out, err = (path.read_text() for path in printed)
        return subprocess.CompletedProcess(arguments[0], status, out, err)


def _run(words, cwd, env, printed):
    """Be the program, in the fork."""
    for stream, path in enumerate(printed, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    # Those of pytest, which a program does not see.
    ours = (TESTS, TESTS.parent / "scripts")
    others = [place for place in sys.path if place and Path(place) not in ours]
    paths = [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place]
    is_module = words[0] == "-m"
    first = Path.cwd() if is_module else Path(words[0]).resolve().parent
    sys.path[:] = [str(first), *paths, *others]
    try:
        if is_module:
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        # A process of multiprocessing ends without them.
        atexit._run_exitfuncs()
