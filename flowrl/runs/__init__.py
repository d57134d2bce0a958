"""One run's folder: file names, whole writing, the lock, and checkpoints."""
