"""A run's folder: its record, lock, checkpoints, scores and results. To read a run, no training code is needed."""
