"""Train a flow-matching policy by reinforcement learning: python train.py sampler=cps loss=dppo"""

import sys
from functools import partial

import hydra
from omegaconf import DictConfig

from flowrl.launch import one_line_errors, register_resolvers, run

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run a composed configuration; a failure leaves Hydra as an exit status, without its own report."""
    if status := one_line_errors(partial(run, cfg)):
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(one_line_errors(main))
