"""Hydra plugins of reseed: the launcher of local sweeps, and a config folder of the user's own."""
