"""The row-wise rest of a post-norm transformer layer: output projection, residual, norm, FFN, residual, norm."""
