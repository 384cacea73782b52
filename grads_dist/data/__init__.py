"""Reads a corpus, formats and tokenizes it, and marks the tokens that carry loss."""
