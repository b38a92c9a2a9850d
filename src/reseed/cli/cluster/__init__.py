"""SLURM: submitting jobs, following them, and the tasks that run on the nodes."""
