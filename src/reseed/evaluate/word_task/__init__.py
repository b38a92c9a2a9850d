"""A language model's representation of single words: words of its vocabulary, prompts, activations,
and linear probes for a property of the word. Nothing here depends on an SAE."""
