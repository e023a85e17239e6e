"""Training: the loop, and what it keeps (averaged weights, checkpoints, statistics)."""
