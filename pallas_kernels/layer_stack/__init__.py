"""A whole stack of post-norm layers, attention and all, as one kernel: for batches of few rows."""
