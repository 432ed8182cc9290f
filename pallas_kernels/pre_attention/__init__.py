"""The row-wise part of an HSTU layer before its attention: norm, product, SiLU, cut into u, v, q and k."""
