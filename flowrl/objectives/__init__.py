"""Training objectives, and the gate that a policy must pass before its first update."""
