"""Sweeps on one machine: each job in processes of its own, on slots of a pool."""
