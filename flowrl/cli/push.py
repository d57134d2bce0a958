"""Share a finished run: write a folder with its weights and a model card, and upload it to the hub.

    python scripts/push_run.py outputs/latest me/my-lora --dry-run --out my-lora
    python scripts/push_run.py outputs/latest me/my-lora --private
    python scripts/push_run.py outputs/latest me/my-lora --evaluation outputs/evaluation

The folder holds the LoRA, which the stock pipeline's `load_lora_weights` takes, or the whole
transformer; a model card; the last pictures before and after training; and the configuration,
without secrets, addresses of servers and places on this machine. The card's scores are the means of
the run's own evaluations, or with --evaluation those of scripts/evaluate.py, with intervals. A run
that has not finished, or whose weights add nothing, is refused.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import tempfile
from pathlib import Path

from flowrl.cli import arguments
from flowrl.sharing import hub
from flowrl.sharing.folder import Shared, examine, write_folder


def main() -> None:
    """Write the folder, and unless it is a dry run upload it."""
    args = arguments.push().parse_args()
    hub.check_name(args.repository)
    if not args.dry_run:
        hub.check_token()
    run = args.run.expanduser().resolve()
    shared = examine(run, args.evaluation)
    for note in shared.notes:
        print(f"note: {note}")
    warn_of_fallen(shared)
    with tempfile.TemporaryDirectory() as temporary:
        default = run / "hub" if args.dry_run else Path(temporary, "folder")
        out = args.out or default
        for path in write_folder(shared, out, args.repository, args.revision):
            print(path if args.dry_run or args.out else path.relative_to(out))
        if args.dry_run:
            print(f"nothing was uploaded; look at {out}/README.md")
            return
        print(hub.upload(out, args.repository, is_private=args.private, revision=args.revision))


def warn_of_fallen(shared: Shared) -> None:
    """Say which headlines are lower than before training; the card says so too."""
    for scores in shared.scores:
        if scores.has_fallen:
            print(f"note: on {scores.name} the headline is lower after training than before")


if __name__ == "__main__":
    raise SystemExit(run_program(main))
