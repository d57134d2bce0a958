"""Apply the mutations of tests/mutations.toml one at a time and report any that no test notices.

    python scripts/mutation.py                 # all of them: minutes, one test process each
    python scripts/mutation.py gaussian.py     # those of files whose path contains the word

Each entry names a file of the package, the text to replace (exactly one occurrence), its replacement and the tests
that must fail. The work is done in a copy; exit status 1 if a mutation survives or does not apply.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("flowrl", "tests", "conf", "scripts", "train.py", "pyproject.toml", "README.md", "CONTRIBUTING.md")


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def apply(folder: Path, mutation: dict[str, str]) -> str:
    """Mutate a file of the copy and return its former text. Raises ValueError unless `old` occurs exactly once."""
    path = folder / mutation["file"]
    text = path.read_text()
    count = text.count(mutation["old"])
    if count != 1:
        raise ValueError(f"{mutation['file']}: {mutation['old']!r} occurs {count} times, not once")
    path.write_text(text.replace(mutation["old"], mutation["new"]))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only mutations of files whose path contains it")
    word = parser.parse_args().word
    mutations = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["mutation"]
    mutations = [mutation for mutation in mutations if word in mutation["file"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, folder / part)
        tests = sorted({test for mutation in mutations for test in mutation["tests"]})
        clean = run_tests(folder, tests)
        if clean.returncode:
            print(f"the tests fail without any mutation:\n{clean.stdout}")
            return 1
        survivors = 0
        for mutation in mutations:
            text = apply(folder, mutation)
            # 1: tests ran and some failed. Anything else, such as an import error in the test itself, proves nothing.
            has_died = run_tests(folder, mutation["tests"]).returncode == 1
            (folder / mutation["file"]).write_text(text)
            survivors += not has_died
            verdict = "killed" if has_died else "SURVIVED"
            print(f"{verdict:<9} {mutation['file']}: {mutation['old']!r} -> {mutation['new']!r}", flush=True)
    print(f"{len(mutations) - survivors} of {len(mutations)} mutations killed, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
