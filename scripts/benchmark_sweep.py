"""Measure how well a sweep keeps its slots busy: wall time over the sum of its jobs' times divided
by the slots.

    python scripts/benchmark_sweep.py                       # 12 jobs on 2 CPU slots
    python scripts/benchmark_sweep.py --jobs 4 num_iterations=5    # any override of train.py

1 is perfect; starting the sweep and handing out slots cost the rest. Times are those in each
job.json.
"""

from flowrl.launch.program import run_program

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flowrl.runs.installation import TRAIN

JOB = ("debug=smoke", "num_iterations=20", "viewing.every=0", "checkpoint.every=20")


def main() -> None:
    """Run the sweep and print the ratio; 1 where it is above --most."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument(
        "--most", type=float, default=1.15, help="exit with status 1 above this ratio"
    )
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    seeds = f"seed={','.join(map(str, range(args.jobs)))}"
    with tempfile.TemporaryDirectory() as place:
        places = (f"hydra.launcher.slots={args.slots}", f"hydra.sweep.dir={place}/sweep")
        command = [sys.executable, str(TRAIN), "-m", *JOB, *args.overrides, seeds, *places]
        start = time.monotonic()
        subprocess.run(command, check=True)
        wall = time.monotonic() - start
        jobs = [json.loads(path.read_text()) for path in Path(place, "sweep").glob("*/job.json")]
    assert len(jobs) == args.jobs and {job["state"] for job in jobs} == {"finished"}
    total = sum(job["seconds"] for job in jobs)
    ratio = wall / (total / args.slots)
    print(
        f"{args.jobs} jobs of {total / args.jobs:.1f} s on {args.slots} slots in {wall:.1f} s: "
        f"ratio {ratio:.3f}"
    )
    if ratio > args.most:
        sys.exit(f"error: the ratio is above --most={args.most}")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
