"""FlowRL in a notebook: a handful of names around one class."""

from flowrl.api.experiment import Experiment, load

__all__ = ["Experiment", "load"]
