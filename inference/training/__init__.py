"""The loop of a fit, and what keeps it safe: checkpoints, checks, several processes."""
