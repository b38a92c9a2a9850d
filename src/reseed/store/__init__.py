"""Results on disk: runs, sweeps, and what evaluations found."""
