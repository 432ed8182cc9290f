"""Fused operations, one folder each: `api` is the public function, `reference` the plain jax.numpy one."""
