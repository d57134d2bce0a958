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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from flowrl.errors import UserError

ROOT = Path(__file__).parents[1]
COPIED = ("flowrl", "tests", "conf", "experiments", "scripts", "train.py")
COPIED += ("pyproject.toml", "README.md", "CONTRIBUTING.md")
VERDICT = re.compile(r"^(\S+?::\w+)(?:\[.*\])? (PASSED|FAILED)", re.MULTILINE)


def run_tests(
    folder: Path, tests: list[str]
) -> tuple[subprocess.CompletedProcess[str], set[str], set[str]]:
    """The test process, and the names, without parameters, of the tests that ran and of those that
    failed.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=alone)
    verdicts = VERDICT.findall(process.stdout)
    return (
        process,
        {name for name, _ in verdicts},
        {name for name, verdict in verdicts if verdict == "FAILED"},
    )


def mutated(text: str, mutation: dict[str, str]) -> str:
    """The file's text with the mutation. Raises UserError unless `old` occurs exactly once."""
    count = text.count(mutation["old"])
    if count != 1:
        raise UserError(f"{mutation['file']}: {mutation['old']!r} occurs {count} times, not once")
    return text.replace(mutation["old"], mutation["new"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "word", nargs="?", default="", help="only mutations of files whose path contains it"
    )
    parser.add_argument("--jobs", type=int, default=2, help="test processes at a time")
    args = parser.parse_args()
    mutations = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    mutations = [mutation for mutation in mutations if args.word in mutation["file"]]
    with tempfile.TemporaryDirectory() as name:
        folders: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            folder = Path(name) / str(number)
            folder.mkdir()
            for part in COPIED:
                copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
                copy(ROOT / part, folder / part)
            folders.put(folder)
        process, idle, _ = run_tests(
            folder, sorted({test for mutation in mutations for test in mutation["tests"]})
        )
        if process.returncode:
            print(f"the tests fail without any mutation:\n{process.stdout}")
            return 1

        def failures(mutation: dict[str, str]) -> tuple[bool, set[str]]:
            folder = folders.get()
            path = folder / mutation["file"]
            text = path.read_text()
            path.write_text(mutated(text, mutation))
            process, _, failed = run_tests(folder, mutation["tests"])
            path.write_text(text)
            folders.put(folder)
            # 1: tests ran and some failed. Anything else, such as an import error in the test
            # itself, proves nothing.
            return process.returncode == 1, failed

        killed = 0
        with ThreadPoolExecutor(args.jobs) as pool:
            for mutation, (has_died, failed) in zip(
                mutations, pool.map(failures, mutations), strict=True
            ):
                idle -= failed
                killed += has_died
                verdict = "killed" if has_died else "SURVIVED"
                print(
                    f"{verdict:<9} {mutation['file']}: {mutation['old']!r} -> {mutation['new']!r}",
                    flush=True,
                )
    print(f"{killed} of {len(mutations)} mutations killed, {len(mutations) - killed} survived")
    if idle and not args.word:
        print("tests that no mutation made fail:", *sorted(idle), sep="\n  ")
    return int(killed < len(mutations))


if __name__ == "__main__":
    sys.exit(main())
