"""The row-wise part of an HSTU layer after its attention: norm, gate, product, residual."""
