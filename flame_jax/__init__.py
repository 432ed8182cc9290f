"""FLAME-JAX: a serving engine for generative-recommendation ranking on JAX/XLA."""

__version__ = "0.1.0"
