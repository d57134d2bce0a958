"""Hydra's door to `flowrl.sweep`; Hydra finds launchers only below `hydra_plugins`."""
