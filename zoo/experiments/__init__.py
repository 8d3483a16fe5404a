"""One re-runnable file per published row, and its results."""
