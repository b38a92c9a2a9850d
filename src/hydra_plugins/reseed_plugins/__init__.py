"""Hydra plugins of reseed: launchers for local and SLURM sweeps, and the user's config folder."""
