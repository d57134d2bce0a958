"""Prompt sets are sequences of `Prompt` to train on or to evaluate."""
