"""The way from a command line to a finished run; beside it only train.py, scripts/ and
hydra_plugins/ know Hydra.
"""
