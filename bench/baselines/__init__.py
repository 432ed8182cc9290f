"""What others get for the same model: plain JAX with XLA, cuDNN or tokamax attention, and PyTorch.

`inputs.make_inputs` makes one batch twice, packed for the engine and regular for the baselines; `runs.jax_runs` and
`torch_models.torch_runs` give a `Run` per baseline, `inputs.packed_run` the engine's. Timing is the caller's.
"""
