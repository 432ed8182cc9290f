"""The fused kernels on a GPU: checked, timed against what others get, tuned."""
