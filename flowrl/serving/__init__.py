"""A reward behind HTTP: what `scripts/serve_reward.py` starts and `flowrl.rewards.remote` asks."""
