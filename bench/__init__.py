"""Benchmarks and device checks; results lie under `bench/results/`."""
