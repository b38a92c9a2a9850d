"""The contexts of latents: what they fire on, promote, and lie beside."""
