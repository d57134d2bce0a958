"""Rewards: one scorer per file behind one protocol, and their mixture."""
