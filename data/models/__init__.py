"""Models: their files, names and tokenizers, and what they respond."""
