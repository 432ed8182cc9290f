"""Proximal Data Accelerator: feature store, assembly, staging."""
