"""Training: groups of runs on one stream of activations, in one Lightning module."""
