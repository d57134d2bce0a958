"""Vote on a run's pictures in a browser: two side by side, chosen by the arrow keys.

    flowrl vote outputs/latest
    flowrl vote outputs/latest --port 8080
    flowrl vote RUN --host 0.0.0.0 --token-env VOTING_TOKEN

The run's reward is votes (reward=votes), and may be training, stopped or finished. Left and right
prefer a picture, down neither, up or backspace takes the last vote back. Every vote is on the disk
at once, in RUN/votes/votes.jsonl: the browser, this program and training may each end and begin
anew without the others. Only who has the address, with what stands behind its #, can see pictures
and vote. On a remote machine, leave --host and forward the port: ssh -L 8001:127.0.0.1:8001 HOST.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import os
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path

from flowrl.cli import arguments
from flowrl.errors import UserError
from flowrl.runs.files import CONFIG
from flowrl.votes.files import FOLDER, PAIRS

NEEDED = ("uvicorn", "starlette", "prometheus_client")
"""What the extra `serve` installs."""


def main() -> None:
    """Read the command line, and serve the page until a signal."""
    args = arguments.vote().parse_args()
    for package in NEEDED:
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'flowrl-lightning[serve]'")
    folder = folder_of(args.run.expanduser())
    token = read_token(args.token_env)
    # Only now, since PyTorch takes seconds to import.
    from flowrl.serving.voting import serve_votes

    serve_votes(folder, host=args.host, port=args.port, token=token)


def folder_of(place: Path) -> Path:
    """Return the folder of votes of a run, which may be given itself. Raises UserError for any
    other.
    """
    if (place / PAIRS).is_file():
        return place
    folder = place / FOLDER
    if folder.is_dir():
        return folder
    if (place / CONFIG).is_file():
        raise UserError(
            f"{place} has no pictures to vote on; its reward must be votes (reward=votes), and a "
            "run that has just started draws them first: try again then. Votes at another place "
            "are given by their folder"
        )
    raise UserError(f"{place} is no folder of a run; give one, such as outputs/latest")


def read_token(token_env: str | None) -> str:
    """Return the token in an environment variable, or a new one. Raises UserError where the
    variable holds none that an address can carry.
    """
    if token_env is None:
        return secrets.token_urlsafe(24)
    token = os.environ.get(token_env, "")
    if len(token) < 8 or not token.replace("-", "").replace("_", "").isalnum():
        raise UserError(
            f"--token-env {token_env}: set the environment variable {token_env} to a token of at "
            "least 8 letters, digits, - and _"
        )
    return token


if __name__ == "__main__":
    sys.exit(run_program(main))
