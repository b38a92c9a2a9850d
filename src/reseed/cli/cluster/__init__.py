"""SLURM: what is submitted, what became of it, and what runs on the nodes."""
