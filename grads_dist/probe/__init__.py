"""Runs the model over the corpus and records the statistics of every row."""
