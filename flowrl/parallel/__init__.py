"""Running in several processes or threads: strategies, divided weights, work in the background."""
