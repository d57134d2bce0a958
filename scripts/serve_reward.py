"""Serve a reward over HTTP: POST /score, GET /health, GET /metrics.

    python scripts/serve_reward.py reward=shapes port=8000
    python train.py reward=remote reward.url=http://127.0.0.1:8000

A scorer whose packages do not go with the trainer's runs from a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from flowrl.command import one_line_errors

CONF = Path(__file__).parents[1] / "conf"
SETTINGS = ("host", "port", "device", "max_batch", "max_wait", "max_waiting", "max_connections", "shutdown_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="reward=NAME, and keys of conf/serve.yaml or of the reward")
    overrides = parser.parse_args().overrides
    try:
        from flowrl.serving.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'flowrl[serve]'") from error
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = compose("serve", overrides=overrides)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    settings = {name: cfg[name] for name in SETTINGS}
    serve(instantiate(cfg.reward), limits=instantiate(cfg.limits), token_env=cfg.token_env, **settings)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
