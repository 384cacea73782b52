"""Turns scores and neighbours into a subset."""
