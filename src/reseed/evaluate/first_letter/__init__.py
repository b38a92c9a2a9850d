"""What a language model knows of single words: which are its vocabulary's, what it makes of them in
a prompt, and linear probes that read a property of the word. Nothing here sees an SAE."""
