"""Ranking models as Flax modules with pure functions for serving."""
