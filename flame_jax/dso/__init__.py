"""Dynamic Stream Orchestrator: batches, splits and runs requests over pre-built executors."""
