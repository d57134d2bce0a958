"""Tuning: which weights are trained, and the files that hold them."""
