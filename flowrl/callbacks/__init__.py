"""Lightning callbacks: evaluation with pictures, the run's own record, checkpoints."""
