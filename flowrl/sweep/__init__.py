"""Sweeps on one machine run each job in processes of its own, on slots of a pool."""
