"""Prompt sets: sequences of `Prompt` to train on or to evaluate."""
