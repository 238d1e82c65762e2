"""One training run on the host: compiled programs, checkpoints, logs, and the run directory."""
