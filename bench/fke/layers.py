"""The engine's HSTU layers alone as a program, and what it is given: packed tokens, and histories in pages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from bench.baselines.inputs import Inputs, Run
from bench.baselines.runs import hstu_tokens
from bench.fke import pages
from bench.threads import lowering_processes
from flame_jax.config import ModelConfig
from flame_jax.models.hstu_layer import hstu_layer
from flame_jax.models.serving import served_slot, served_weights
from flame_jax.packing import CANDIDATE_COUNT, CANDIDATE_START, HISTORY_START
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import Pages, Silu

History = list[tuple[jax.Array, jax.Array]]
"""Keys and values by layer."""
Operands = tuple[jax.Array, dict[str, jax.Array], jax.Array, jax.Array, tuple[jax.Array, History] | None]
"""Of `Layers`."""


@dataclass(frozen=True)
class Layers:
    """The layers as a function of arrays.

    Attributes:
        window: rows of the longest history.
        first: first candidate row; 0 where there are no others.
    """

    config: ModelConfig
    align: int
    window: int
    first: int
    kernels: Kernels

    def __call__(
        self,
        x: jax.Array,
        weights: dict[str, jax.Array],
        rows: jax.Array,
        time: jax.Array,
        pool: tuple[jax.Array, History] | None,
    ) -> jax.Array:
        """x [1, T, D] -> [1, C, D].

        Args:
            weights: by name, [layers, ...].
            rows: request rows.
            time: int32[1, T].
            pool: a page table, and each layer's keys and values in pages; None where histories are among the tokens.
        """
        config, last = self.config, self.config.layers - 1
        attention = partial(
            sumi_attention,
            rows=rows,
            time=time,
            activation=Silu(config.head_dim**-0.5, config.hstu.attention_divisor),
            causal=True,
            align=self.align,
            window=self.window,
            implementation=self.kernels.sumi_attention,
        )
        for index in range(config.layers):
            history = None if pool is None else Pages(*pool[1][index], pool[0])
            x = hstu_layer(
                *(x, weights, index, partial(attention, history=history)),
                config=config,
                first=self.first if index == last else 0,
                kernels=self.kernels,
            )
        return x


def whole(inputs: Inputs) -> tuple[Operands, int]:
    """Histories and candidates packed, of the baselines' tokens; and the first candidate row."""
    bucket, regular, layout = inputs.bucket, inputs.regular, inputs.config.layout
    fields = served_slot(inputs.config.model, inputs.config.schema, layout, bucket).views(inputs.words)
    source = np.zeros(bucket.tokens, np.int32)
    each = regular.history + regular.candidates
    for number, row in enumerate(fields["rows"][: len(regular.request_time)]):
        for column, begin, end in ((HISTORY_START, 0, regular.history), (CANDIDATE_START, regular.history, each)):
            source[row[column] : row[column] + end - begin] = number * each + np.arange(begin, end)
    tokens = hstu_tokens(inputs)
    x = tokens.reshape(-1, tokens.shape[-1])[source][None]
    rows, time = jnp.asarray(fields["rows"]), jnp.asarray(fields["time"])
    return (x, _weights(inputs), rows, time, None), bucket.tokens - bucket.candidates


def _weights(inputs: Inputs) -> dict[str, jax.Array]:
    served, prefix = served_weights(inputs.config.model, inputs.weights), "layers/"
    return {name.removeprefix(prefix): jnp.asarray(w) for name, w in served.items() if name.startswith(prefix)}


def candidates_alone(inputs: Inputs, history: History) -> Operands:
    """The same requests without their histories' tokens; keys and values [B, h, heads, dim] of these go into pages."""
    (x, weights, rows, time, _), first = whole(inputs)
    moved = rows.at[:, CANDIDATE_START].add(-first).at[:, HISTORY_START].set(0)
    alone = jnp.where(rows[:, CANDIDATE_COUNT, None] > 0, moved, rows)
    return x[:, first:], weights, alone, time[:, first:], _in_pages(history, len(rows))


def random_history(inputs: Inputs) -> History:
    """[B, h, heads, dim] in the model's dtype."""
    model, requests, rows = inputs.config.model, len(inputs.regular.request_time), inputs.regular.history

    def layer(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        dims = (model.head_dim, model.hstu.value_dim)
        k, v = (
            jax.random.normal(own, (requests, rows, model.heads, dim), jnp.dtype(model.dtype))
            for own, dim in zip(jax.random.split(key), dims, strict=True)
        )
        return k, v

    return [layer(key) for key in jax.random.split(jax.random.key(0), model.layers)]


def _in_pages(history: History, most: int) -> tuple[jax.Array, History]:
    """The page table of `most` requests, and each layer's keys and values in pages."""
    requests, rows = history[0][0].shape[:2]
    width = -(-rows // pages.ROWS)
    lengths = np.where(np.arange(most) < requests, rows, 0)
    table = jnp.asarray(pages.page_table(lengths, width, most * width, np.random.default_rng(0)))

    @jax.jit
    def cut(dense: jax.Array) -> jax.Array:
        every = jnp.pad(dense, ((0, most - requests), *[(0, 0)] * 3))
        return pages.cut(every[None], jnp.asarray(lengths)[:, None], table, most * width)

    return table, [(cut(k), cut(v)) for k, v in history]


def layers_run(layers: Layers, operands: Operands, inputs: Inputs) -> Run:
    """Not yet compiled; its scores are the candidates' rows, float32[B, c, D]."""

    @cache
    def program() -> Any:
        if layers.kernels == REFERENCE:
            return jax.jit(partial(Layers.__call__, layers)).lower(*operands).compile()
        specs: Any = jax.eval_shape(lambda: operands)
        with lowering_processes(1) as process:
            portable = process.submit(exported, layers, specs).result()
        return jax.jit(jax.export.deserialize(bytearray(portable)).call).lower(*operands).compile()

    def rows(output: jax.Array) -> np.ndarray:
        flat = np.asarray(output[0], np.float32)
        return np.stack([flat[place] for place in inputs.places])

    return Run(lambda: program()(*operands), jax.block_until_ready, rows, program)


def exported(layers: Layers, specs: Operands) -> bytes:
    """The layers for a GPU in portable form: Pallas takes its time over it, in Python."""
    return bytes(jax.export.export(jax.jit(partial(Layers.__call__, layers)), platforms=["cuda"])(*specs).serialize())
