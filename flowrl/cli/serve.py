"""Serve a reward over HTTP: POST /score, GET /health, GET /metrics.

    python scripts/serve_reward.py reward=shapes port=8000
    python train.py reward=remote reward.url=http://127.0.0.1:8000
    python scripts/serve_reward.py reward=ocr host=0.0.0.0 token_env=SCORER_TOKEN

A scorer whose packages do not go with the trainer's runs from a virtual environment of its own.
"""

from __future__ import annotations

from flowrl.launch.program import run_program

import sys
from importlib.util import find_spec

from flowrl.cli import arguments
from flowrl.errors import UserError

NEEDED = ("uvicorn", "starlette", "prometheus_client")
"""What the extra `serve` installs."""

SETTINGS = (
    "host",
    "port",
    "device",
    "max_batch",
    "max_batch_bytes",
    "max_wait",
    "max_waiting",
    "max_waiting_bytes",
    "max_connections",
    "idle_seconds",
    "shutdown_seconds",
)


def main() -> None:
    """Read the command line, build the reward, and serve it until a signal."""
    args = arguments.serve().parse_intermixed_args()
    for package in NEEDED:
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install 'flowrl-lightning[serve]'")
    # Only now, since PyTorch takes seconds to import.
    import torch
    from hydra.utils import instantiate

    from flowrl.launch.compose import compose
    from flowrl.launch.scores import check_served
    from flowrl.launch.search_path import with_config_dir
    from flowrl.launch.services import check_services
    from flowrl.serving.server import serve

    overrides = with_config_dir(args.overrides, args.config_dir)
    cfg = compose(overrides, config="serve")
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    check_served(cfg.reward)
    check_services(cfg.reward)
    settings = {name: cfg[name] for name in SETTINGS}
    serve(
        instantiate(cfg.reward), limits=instantiate(cfg.limits), token_env=cfg.token_env, **settings
    )


if __name__ == "__main__":
    sys.exit(run_program(main, computes=True))
