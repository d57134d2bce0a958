"""FlowRL: reinforcement-learning fine-tuning of flow-matching image models."""

import logging
from typing import TYPE_CHECKING

DISTRIBUTION = "flowrl-lightning"
"""The name to install; the one to import belongs to another project there."""

# diffusers imports bitsandbytes where it is installed, which on some processors asks for a package
# that only speeds up inference there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__: str

if not TYPE_CHECKING:  # a checker would take every name for an attribute

    def __getattr__(name: str) -> str:
        """Read `__version__` from the installed metadata when it is asked for, since most imports
        do not.
        """
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version(DISTRIBUTION)
        except PackageNotFoundError:
            return "0+unknown"  # a folder on the path that was never installed
