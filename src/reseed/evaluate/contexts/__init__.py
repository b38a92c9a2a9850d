"""The contexts of latents: text they fire on, tokens they promote, and nearest latents."""
