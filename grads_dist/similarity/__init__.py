"""Nearest neighbours of rows in feature space."""
