"""The study of the log-ratio's noise: what it computes without a model, and its tables."""
