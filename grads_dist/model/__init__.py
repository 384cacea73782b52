"""Loads the language model and its DeepSpeed settings."""
