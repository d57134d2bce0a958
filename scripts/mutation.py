"""Apply the mutations of tests/mutations.toml one at a time and report any that no test notices.

    python scripts/mutation.py                 # all of them, two test processes at a time
    python scripts/mutation.py gaussian.py     # those of files whose path contains the word

Each entry names a file of the package, the text to replace (exactly one occurrence), its
replacement and the tests that must fail. The work is done in copies; exit status 1 if a mutation
survives or does not apply. Tests of these files that no mutation made fail are listed at the end:
each wants an entry.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TypedDict

from flowrl.errors import UserError

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
VERDICT = re.compile(r"^(\S+?::\w+)(?:\[.*\])? (PASSED|FAILED)", re.MULTILINE)


class Mutation(TypedDict):
    """A row of tests/mutations.toml."""

    file: str
    old: str
    new: str
    tests: list[str]


def run_tests(
    folder: Path, tests: Sequence[str]
) -> tuple[subprocess.CompletedProcess[str], set[str], set[str]]:
    """Return the test process, and the names, without parameters, of the tests that ran and of
    those that failed.
    """
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    # Programs that the tests start import the copy too, not the package as it is installed.
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    process = subprocess.run(
        [*command, *tests], cwd=folder, capture_output=True, text=True, env=alone
    )
    verdicts = VERDICT.findall(process.stdout)
    names = {name for name, _ in verdicts}
    failed = {name for name, verdict in verdicts if verdict == "FAILED"}
    return process, names, failed


def mutated(text: str, mutation: Mutation) -> str:
    """Return the file's text with the mutation. Raises UserError unless `old` occurs exactly
    once.
    """
    count = text.count(mutation["old"])
    if count != 1:
        raise UserError(f"{mutation['file']}: {mutation['old']!r} occurs {count} times, not once")
    return text.replace(mutation["old"], mutation["new"])


def make_copy(folder: Path) -> None:
    """Copy what the tests need into a new folder."""
    folder.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)


def failures(folders: SimpleQueue[Path], mutation: Mutation) -> tuple[bool, set[str]]:
    """Apply a mutation in a copy that is free; tell whether its tests noticed, and which failed."""
    folder = folders.get()
    path = folder / mutation["file"]
    text = path.read_text()
    path.write_text(mutated(text, mutation))
    process, _, failed = run_tests(folder, mutation["tests"])
    path.write_text(text)
    folders.put(folder)
    # 1: tests ran and some failed. Anything else, such as an import error in the test itself,
    # proves nothing.
    return process.returncode == 1, failed


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
    args = parser.parse_args()
    table = (ROOT / "tests" / "mutations.toml").read_text()
    rows: list[Mutation] = tomllib.loads(table)["mutation"]
    mutations = [mutation for mutation in rows if args.word in mutation["file"]]
    with tempfile.TemporaryDirectory() as name:
        folders: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            folder = Path(name) / str(number)
            make_copy(folder)
            folders.put(folder)
        process, idle, _ = run_tests(folder, all_tests(mutations))
        if process.returncode:
            print(f"the tests fail without any mutation:\n{process.stdout}")
            return 1
        killed = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            results = pool.map(partial(failures, folders), mutations)
            for mutation, (has_died, failed) in zip(mutations, results, strict=True):
                idle -= failed
                killed += has_died
                print_verdict(mutation, has_died)
    print(f"{killed} of {len(mutations)} mutations killed, {len(mutations) - killed} survived")
    if idle and not args.word:
        print("tests that no mutation made fail:", *sorted(idle), sep="\n  ")
    return int(killed < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
