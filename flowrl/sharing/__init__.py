"""The sharing of runs: a folder with weights, pictures and a model card, and its upload."""
