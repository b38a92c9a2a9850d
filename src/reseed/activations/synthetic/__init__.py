"""Activations without a language model: worlds of known features, and surrogates of real ones."""
