"""What only training uses: examples, baselines, evaluation, the loop."""
