"""Train a flow-matching policy by reinforcement learning: flowrl train sampler=cps loss=dppo"""

from flowrl.launch.program import run_program

import sys

import hydra
from omegaconf import DictConfig

from flowrl.launch.compose import register_resolvers
from flowrl.runs.installation import CONF

register_resolvers()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run a composed configuration; a job of a search returns its objective."""
    # Only now, so that a misspelt key or value is answered before PyTorch loads.
    from flowrl.launch.door import enter

    return enter(cfg)


if __name__ == "__main__":
    sys.exit(run_program(main, takes_overrides=True, computes=True))
