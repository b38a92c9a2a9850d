"""Measures on activations: what the latents of several SAEs do on the same tokens."""
