"""The silencing of messages of libraries that do not concern this training loop."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from flowrl.parallel.strategies import is_later_rank


def quieten() -> None:
    """Silence advice about Lightning's defaults that does not concern this loop, and later ranks'
    standard output.
    """
    if is_later_rank():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    advice = (
        *("available:", "litlogger", "litmodels", "Detected Keyb"),
        *("`Trainer.fit` stopped", "per epoch will be used"),
    )
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).addFilter(
            lambda record: not any(word in record.getMessage() for word in advice)
        )
    for message in (
        ".*does not have many workers.*",
        ".*module\\(s\\) in eval mode.*",
        ".*LeafSpec.*",
        ".*ranks is zero.*",
    ):
        warnings.filterwarnings("ignore", message)
