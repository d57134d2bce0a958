"""Votes of people on pairs of pictures: their files, and the scores that are fitted to them."""
