"""The folder of one run: file names, whole writing, the lock, and checkpoints."""
