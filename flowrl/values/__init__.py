"""Values of a configuration: the bounds that hints state, their words, and their check."""
