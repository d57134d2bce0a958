"""Samplers: each maps a velocity at one noise level to the Gaussian of the next state."""
