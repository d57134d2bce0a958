"""Policy losses: pure functions from `LossInputs` to `LossOutput`, and the reference penalty."""
