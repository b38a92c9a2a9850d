"""Feature absorption (Chanin et al. 2024): a latent that represents a class is silent on some words
of the class, because a latent specific to the word has absorbed its direction."""
