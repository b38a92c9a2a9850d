"""Feature absorption (Chanin et al. 2024): latents that are silent on words that they stand for,
because a latent of the word itself has taken their direction over."""
