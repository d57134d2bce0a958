"""Apply the mutations of tests/mutations.toml one at a time and report any that no test notices.

    python scripts/mutation.py                 # all of them, two test processes at a time
    python scripts/mutation.py gaussian.py     # those of files whose path contains the word
    python scripts/mutation.py --quick --skip 90

Each entry names a file of the package, the text to replace (exactly one occurrence), its
replacement and the tests that must fail. The work is done in copies; exit status 1 if a mutation
survives or does not apply. Tests of these files that no mutation made fail are listed at the end:
each wants an entry. `--quick` is for a tree whose tests are known to pass: they are not run without
a mutation, and with one only until the first fails, so that nothing can be said of idle tests.

The tests of a mutation run in a fork of this process, which has the libraries imported and nothing
of the project: most of a short test's time is their import.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).parents[1]
FOLDERS = ("flowrl", "tests", "conf", "docs", "examples", "experiments", "hydra_plugins", "scripts")
FILES = (
    "train.py",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "Makefile",
    "constraints.txt",
    "setup.py",
)
LIBRARIES = (
    "diffusers",
    "hydra",
    "hypothesis",
    "jaxtyping",
    "lightning",
    "open_clip",
    "peft",
    "pytest",
    "scipy.ndimage",
    "torch",
    "torchvision",
    "transformers",
)
VERDICT = re.compile(r"^(\S+?::\w+)(?:\[.*\])? (PASSED|FAILED)", re.MULTILINE)


class Mutation(TypedDict):
    """A row of tests/mutations.toml."""

    file: str
    old: str
    new: str
    tests: list[str]


LONGEST = 600.0
"""Seconds that the tests of a mutation may take."""


@dataclass(frozen=True, slots=True)
class Run:
    """Tests that run in a copy, in a process of their own."""

    process: BaseProcess
    folder: Path
    began: float

    @property
    def output(self) -> Path:
        """The file beside the copy that holds what the tests print."""
        return self.folder.with_suffix(".txt")

    def verdicts(self) -> tuple[set[str], set[str]]:
        """Return the names, without parameters, of the tests that ran and of those that failed."""
        found = VERDICT.findall(self.output.read_text(errors="replace"))
        ran = {name for name, _ in found}
        return ran, {name for name, verdict in found if verdict == "FAILED"}


def start(folder: Path, tests: Sequence[str]) -> Run:
    """Start tests in a copy; the process's exit status is pytest's."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, tests))
    process.start()
    return Run(process, folder, time.monotonic())


def run_tests(folder: Path, tests: Sequence[str]) -> None:
    """Run tests in a copy, and end this process with pytest's exit status."""
    import pytest

    os.chdir(folder)
    # What the tests print goes to a file, and so does what the programs print that they start.
    file = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    # Programs that the tests start import the copy too, not the package as it is installed.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    # Compiled files are told by size and second: those of a mutation must not serve the next one.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place) != ROOT / "scripts")]
    options = ["-vv", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    # pytest's plugins are among what is imported already.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(int(status))


def import_libraries() -> None:
    """Import what most tests import, none of which runs threads before it is used."""
    for name in LIBRARIES:
        importlib.import_module(name)


def mutated(text: str, mutation: Mutation) -> str:
    """Return the file's text with the mutation. Ends the program unless `old` occurs exactly
    once.
    """
    count = text.count(mutation["old"])
    if count != 1:
        sys.exit(f"{mutation['file']}: {mutation['old']!r} occurs {count} times, not once")
    return text.replace(mutation["old"], mutation["new"])


def make_copy(folder: Path) -> None:
    """Copy what the tests need into a new folder."""
    folder.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)


def apply(folder: Path, mutation: Mutation, options: Sequence[str]) -> Run:
    """Apply a mutation in a copy, and start its tests with these options of pytest's."""
    path = folder / mutation["file"]
    path.write_text(mutated(path.read_text(), mutation))
    return start(folder, [*options, *mutation["tests"]])


def finish(run: Run, mutation: Mutation) -> bool:
    """Undo a mutation; tell whether its tests noticed."""
    shutil.copy(ROOT / mutation["file"], run.folder / mutation["file"])
    # 1: tests ran and some failed. Anything else, such as an import error in the test itself,
    # proves nothing.
    return run.process.exitcode == 1


def end_hanging(runs: Sequence[Run]) -> None:
    """End tests of a mutation that have run for `LONGEST` seconds, and say so: they notice it by
    waiting for ever, which is no failure, so that it counts as one that survived.
    """
    for run in runs:
        if run.process.exitcode is None and time.monotonic() - run.began > LONGEST:
            run.process.kill()
            run.process.join()
            print(f"still running after {LONGEST:g} s, and ended: {run.output.read_text()[-300:]}")


def print_verdict(mutation: Mutation, has_died: bool) -> None:
    """Print a line that says whether a mutation was noticed."""
    verdict = "killed" if has_died else "SURVIVED"
    change = f"{mutation['old']!r} -> {mutation['new']!r}"
    print(f"{verdict:<9} {mutation['file']}: {change}", flush=True)


def all_tests(mutations: Sequence[Mutation]) -> list[str]:
    """List the tests that mutations name, each once."""
    return sorted({test for mutation in mutations for test in mutation["tests"]})


def main() -> int:
    """Apply the mutations chosen, and print what became of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "word", nargs="?", default="", help="only mutations of files whose path contains it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="test processes at a time")
    parser.add_argument("--quick", action="store_true", help="stop at the first test that fails")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of the first ones")
    args = parser.parse_args()
    table = (ROOT / "tests" / "mutations.toml").read_text()
    rows: list[Mutation] = tomllib.loads(table)["mutation"]
    mutations = [mutation for mutation in rows if args.word in mutation["file"]][args.skip :]
    options = ["-x"] if args.quick else []
    import_libraries()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / str(number) for number in range(args.jobs)]
        for folder in folders:
            make_copy(folder)
        running: list[tuple[Run, Mutation | None]] = []
        idle: set[str] = set()
        if not args.quick:
            # Without a mutation the tests must pass; the first mutations are tried meanwhile.
            running.append((start(folders.pop(), all_tests(mutations)), None))
        waiting = list(reversed(mutations))
        failed: set[str] = set()
        killed = 0
        while waiting or running:
            while waiting and folders:
                mutation = waiting.pop()
                running.append((apply(folders.pop(), mutation, options), mutation))
            wait([run.process.sentinel for run, _ in running], timeout=10)
            end_hanging([run for run, ended in running if ended is not None])
            for run, ended in [pair for pair in running if pair[0].process.exitcode is not None]:
                running.remove((run, ended))
                folders.append(run.folder)
                if ended is not None:
                    has_died = finish(run, ended)
                    killed += has_died
                    failed |= run.verdicts()[1]
                    print_verdict(ended, has_died)
                elif run.process.exitcode:
                    print(f"the tests fail without any mutation:\n{run.output.read_text()}")
                    for other, _ in running:
                        other.process.terminate()
                        other.process.join()
                    return 1
                else:
                    idle = run.verdicts()[0]
    print(f"{killed} of {len(mutations)} mutations killed, {len(mutations) - killed} survived")
    if idle - failed and not args.word:
        print("tests that no mutation made fail:", *sorted(idle - failed), sep="\n  ")
    return int(killed < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
