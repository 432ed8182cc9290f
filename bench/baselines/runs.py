"""Every JAX baseline of a model as a `Run`, and of HSTU's layers with a history that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal

import jax
import numpy as np

from bench.baselines import attention, dense, silu
from bench.baselines.inputs import Inputs, Run
from bench.baselines.weights import climber_weights, hstu_weights, outer_weights

Part = Literal["rank", "stack"]
"""Ids to scores, or the layers alone."""

CLIMBER: dict[str, attention.Attention] = {
    "dense_masked": attention.DenseMasked(),
    "dense_masked_narrow": attention.DenseMasked(wide=False),
    "split_softmax": attention.SplitSoftmax(),
    "split_softmax_narrow": attention.SplitSoftmax(wide=False),
    "split_merged": attention.SplitMerged(),
    "split_merged_narrow": attention.SplitMerged(wide=False),
    "cudnn": attention.FlashMasked(attention.cudnn),
    "cudnn_split": attention.FlashSplit(attention.cudnn),
    "tokamax": attention.FlashMasked(attention.Tokamax()),
    "tokamax_split": attention.FlashSplit(attention.Tokamax()),
}
"""Narrow ones let the logits leave their matrix product in bfloat16: half the traffic, at the cost of some bits."""

HSTU: dict[str, silu.Attention] = {
    "dense": silu.Dense(),
    "dense_narrow": silu.Dense(wide=False),
    "split": silu.Split(),
    "split_chunked": silu.Split(chunk=1024),
    "split_chunked_narrow": silu.Split(chunk=1024, wide=False),
}

GIVEN: dict[str, silu.Given] = {"split_given": silu.Given(), "split_given_narrow": silu.Given(wide=False)}
"""Of HSTU's layers on candidates alone."""


def jax_runs(inputs: Inputs, part: Part = "rank", *, tune: bool = True) -> dict[str, Run]:
    """Name -> baseline, on the default device. Nothing is compiled before the first launch, which may fail.

    Args:
        part: `stack` starts from the token embeddings and gives [blocks, B, c, d], of HSTU [B, c, D].
        tune: let tokamax search its block sizes when its baselines are first launched.
    """
    forms: dict[str, Any] = CLIMBER if inputs.config.model.architecture == "climber" else HSTU
    return {name: jax_run(inputs, form, part, tune=tune and name.startswith("tokamax")) for name, form in forms.items()}


def jax_run(inputs: Inputs, form: Any, part: Part = "rank", *, tune: bool = False) -> Run:
    """One baseline: an `attention.Attention` or, of HSTU, a `silu.Attention`."""
    return plain_run(*program(inputs, form, part), tune=tune)


def given_runs(
    inputs: Inputs, candidates: jax.Array, history: list[tuple[jax.Array, jax.Array]], names: Iterable[str]
) -> dict[str, Run]:
    """Name -> one of `GIVEN`; candidates [B, c, D], k and v [B, h, heads, dim] of each layer's history."""
    config, layers = inputs.config.model, jax.device_put(hstu_weights(inputs.config.model, inputs.weights))

    def run(form: silu.Given) -> Run:
        function = partial(dense.hstu_stack_given, config=config, attention=form)
        return plain_run(function, (candidates, layers, history))

    return {name: run(GIVEN[name]) for name in names}


def plain_run(function: Callable[..., jax.Array], arguments: tuple[Any, ...], *, tune: bool = False) -> Run:
    """A function of arguments on the device, not yet compiled; `tune` as in `jax_runs`."""

    @cache
    def compiled() -> jax.stages.Compiled:
        return _tuned(function, arguments) if tune else jax.jit(function).lower(*arguments).compile()

    def ahead() -> None:
        # A search times candidates: it wants the device to itself.
        if not tune:
            compiled()

    def launch() -> Any:
        return compiled()(*arguments)

    return Run(launch, jax.block_until_ready, lambda output: np.asarray(output, np.float32), ahead)


def program(inputs: Inputs, form: Any, part: Part) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
    """A function to compile, and its arguments on the device."""
    config, history = inputs.config.model, inputs.regular.history
    batch, outer = jax.device_put((vars(inputs.regular), outer_weights(config, inputs.weights)))
    if config.architecture == "climber":
        stack = jax.device_put(climber_weights(config, inputs.weights))
        if part == "rank":
            return lambda b, s, o: dense.climber_rank(b, s, o, config, form), (batch, stack, outer)
        tokens = jax.jit(lambda b, o: dense.embed(b, o, config))(batch, outer)
        numbers = (batch["times"], batch["request_time"], batch["scenario"])
        return lambda *a: dense.climber_stack(*a, heads=config.heads, attention=form), (tokens, *numbers, stack)
    layers = jax.device_put(hstu_weights(config, inputs.weights))
    if part == "rank":
        return lambda b, s, o: dense.hstu_rank(b, s, o, config, form), (batch, layers, outer)
    tokens = hstu_tokens(inputs)
    return lambda x, s: dense.hstu_stack(x, s, history=history, config=config, attention=form), (tokens, layers)


def hstu_tokens(inputs: Inputs) -> jax.Array:
    """What HSTU's layers begin with: [B, h + c, D], history first."""
    config = inputs.config.model
    batch, outer = jax.device_put((vars(inputs.regular), outer_weights(config, inputs.weights)))
    tokens: jax.Array = jax.jit(lambda b, o: dense.encode(dense.embed(b, o, config)[0], b, o, config))(batch, outer)
    return tokens


def _tuned(function: Callable[..., Any], arguments: tuple[Any, ...]) -> jax.stages.Compiled:
    """Compiled with the block sizes that tokamax finds fastest."""
    import tokamax

    with tokamax.autotune(jax.jit(function).lower(*arguments), progress_bar=False):
        return jax.jit(function).lower(*arguments).compile()
