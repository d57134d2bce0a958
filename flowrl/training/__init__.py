"""Training: one iteration of rollouts, rewards, advantages and updates, and what it is made of."""
