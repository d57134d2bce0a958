"""Kill, terminate and interrupt short runs at random moments, resume them, and compare them with
one never stopped.

    python scripts/kill_and_resume.py                       # 30 runs a signal
    python scripts/kill_and_resume.py --count 5 loss=nft sampler=ode

Each trial starts a run, sends it the signal at a random moment between its first file and its end,
resumes it, often with another signal, until it has finished. Then its rows of metrics.csv without
times, the tensors of its last checkpoint, its exported weights and its last picture must equal the
reference's bitwise, nothing half-written may be left behind, and no traceback may have been
printed. Runs are forked from this process, which has imported everything, so that moments during
imports, when nothing is written, are rare. Words with `=` are overrides of train.py for all runs.
The exit status is 1 if any trial failed; the folders of those that did are kept.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from safetensors.torch import load_file

import flowrl.launch.run  # noqa: F401 - heavy, so before the forks
from flowrl.runs.checkpoint import list_with_state
from flowrl.runs.files import CHECKPOINTS, CONFIG, METRICS
from flowrl.runs.installation import TRAIN

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SHORT: tuple[str, ...] = (
    "debug=smoke",
    "num_iterations=6",
    "num_threads=1",
    "viewing.every=3",
    "evaluation.max_prompts=2",
    "evaluation.images_per_prompt=1",
    "evaluation.kl_samples=2",
    "evaluation.num_steps=2",
)
MOST_SIGNALS = 3
TIMES = "perf/"


def start(overrides: list[str], log: Path) -> int:
    """Fork a process that runs train.py with its output in `log`; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        # A script in the background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [str(TRAIN), *overrides]
        runpy.run_path(str(TRAIN), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """Return the exit status of a process, negative after a signal; None if it still runs after
    `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def await_config(folder: Path) -> None:
    """Wait until a new run has written its configuration, or for a minute: then its process has
    ended or hangs.
    """
    deadline = time.monotonic() + 60
    while not (folder / CONFIG).is_file() and time.monotonic() < deadline:
        time.sleep(0.002)


def finish(
    folder: Path, log: Path, overrides: list[str], number: int, rng: random.Random, seconds: float
) -> int:
    """Run to the end through at most `MOST_SIGNALS` signals, and return how many have met a running
    process.
    """
    num_sent = 0
    for attempt in range(MOST_SIGNALS + 1):
        has_begun = (folder / CONFIG).is_file()
        words = [f"resume={folder}"] if has_begun else [*overrides, f"run_dir={folder}"]
        process = start(words, log)
        status = None
        if attempt == 0 or (attempt < MOST_SIGNALS and rng.random() < 0.5):
            await_config(folder)
            status = wait(process, rng.uniform(0, seconds))
            if status is None:
                os.kill(process, number)
                num_sent += 1
        if status is None:
            status = wait(process, 600)
        if status == 0:
            return num_sent
        if status not in (130, -number):
            raise AssertionError(f"exit status {status}, see {log}")
    raise AssertionError(f"not finished after {MOST_SIGNALS} resumptions, see {log}")


def untimed_rows(folder: Path) -> list[dict[str, str]]:
    """Read the rows of a run's metrics.csv, without times."""
    rows = []
    for row in csv.DictReader(io.StringIO((folder / METRICS).read_text())):
        rows.append({name: value for name, value in row.items() if not name.startswith(TIMES)})
    return rows


def state(folder: Path) -> dict[str, object]:
    """Read what must be equal, by name: rows, tensors of the last checkpoint, exported weights,
    last picture.
    """
    last = list_with_state(folder / CHECKPOINTS)[-1]
    files = [
        *last.glob("*.safetensors"),
        *folder.glob("lora/*"),
        *folder.glob("transformer/*.safetensors"),
    ]
    # Not the files: safetensors writes the entries of a file's head in any order.
    picture = max((folder / "images").glob("*.png"))
    values: dict[str, object] = {METRICS: untimed_rows(folder), picture.name: picture.read_bytes()}
    for file in files:
        for name, tensor in load_file(file).items():
            content = (str(tensor.dtype), tensor.shape, tensor.numpy().tobytes())
            values[f"{file.relative_to(folder)} {name}"] = content
    return values


def check(folder: Path, log: Path, reference: dict[str, object]) -> None:
    """Raise AssertionError, naming what differs from the reference or was left behind."""
    result = state(folder)
    differing = sorted(
        name for name in result.keys() | reference.keys() if result.get(name) != reference.get(name)
    )
    unfinished = (".partial", ".deleted", ".damaged")
    left = [path.name for path in folder.rglob("*") if path.suffix in unfinished]
    has_traceback = "Traceback" in log.read_text(errors="replace")
    if differing or left or has_traceback:
        raise AssertionError(
            f"differing: {differing}; left behind: {left}; traceback: {has_traceback}; see {log}"
        )


def main() -> int:
    """Run all trials and print one line for each signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="overrides of train.py for all runs")
    parser.add_argument("--count", type=int, default=30, help="trials of each signal")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--work", type=Path, help="where runs are written; a temporary folder without it"
    )
    args = parser.parse_intermixed_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix="kill_and_resume_"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    overrides = [*SHORT, *args.overrides]
    reference = work / f"reference-{args.seed}"
    process = start([*overrides, f"run_dir={reference}"], work / "reference.log")
    await_config(reference)
    before = time.monotonic()
    if wait(process, 600) != 0:
        raise SystemExit(f"the reference failed: {work / 'reference.log'}")
    seconds = time.monotonic() - before
    expected = state(reference)
    print(f"{work}: a run writes for {seconds:.1f} seconds", flush=True)
    num_failed = 0
    for number in SIGNALS:
        num_sent = 0
        num_equal = 0
        for trial in range(args.count):
            folder = work / f"{number.name}-{args.seed}-{trial}"
            log = folder.with_suffix(".log")
            try:
                num_sent += finish(
                    folder,
                    log,
                    overrides,
                    number,
                    random.Random(f"{args.seed} {folder.name}"),
                    seconds,
                )
                check(folder, log, expected)
                num_equal += 1
                shutil.rmtree(folder)
                log.unlink()
            except AssertionError as error:
                print(f"{folder.name}: {error}")
        num_failed += args.count - num_equal
        print(
            f"{number.name}: {num_sent} sent, {num_equal} of {args.count} runs equal to the "
            "reference",
            flush=True,
        )
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
