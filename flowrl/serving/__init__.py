"""A reward is served over HTTP by `scripts/serve_reward.py`, for `flowrl.rewards.remote` to ask."""
