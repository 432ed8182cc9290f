"""SUMI attention (single user, multiple items) on packed batches."""
