"""Fused Kernel Engine: ahead-of-time artifacts and the compiled engine."""
