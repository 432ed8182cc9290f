"""What varies between SUMI attentions: how logits become weights, what is added to them, and where histories lie."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Softmax(NamedTuple):
    """weights = softmax(logits / temperature).

    Attributes:
        temperature: float32[blocks, scenarios, heads], positive; with `layer`, [layers, ...] of a whole stack.
        layer: which of them. Kernels pick it by number, so that nothing is cut out and copied.
    """

    temperature: jax.Array
    layer: int | None = None

    @property
    def own(self) -> jax.Array:
        """float32[blocks, scenarios, heads]."""
        return self.temperature if self.layer is None else self.temperature[self.layer]


class Silu(NamedTuple):
    """weights = silu(logits) / divisor, HSTU's pointwise attention.

    Attributes:
        scale: q . k is multiplied by this before a bias is added.
        divisor: a constant of the model, never the length of some sequence in the batch.
    """

    scale: float
    divisor: float


class LogBias(NamedTuple):
    """alpha*log2(1+|dp|) + beta*log2(1+|dt|) + gamma, towards history keys only (Climber).

    Attributes:
        coefficients: float32[blocks, scenarios, heads, 3], (alpha, beta, gamma); with `layer`, [layers, ...].
        layer: which of them, as in `Softmax`.
    """

    coefficients: jax.Array
    layer: int | None = None

    @property
    def own(self) -> jax.Array:
        """float32[blocks, scenarios, heads, 3]."""
        return self.coefficients if self.layer is None else self.coefficients[self.layer]


class TableBias(NamedTuple):
    """position[clip(dp) + P - 1] + time[bucket(dt)], shared by the heads (the first HSTU paper's code).

    `dp` is the query's position minus the key's, clipped to [-(P-1), P-1]; `dt` counts from the time of the
    query's successor in the history (a candidate's own time); bucket(d) = floor(ln(max(|d|, 1)) / 0.301),
    at most the last row.

    Attributes:
        position: float32[2*P - 1].
        time: float32[buckets].
    """

    position: jax.Array
    time: jax.Array


PAGE_MULTIPLE = 64
"""Rows of a page are a multiple of this, and of the keys that a kernel takes in one step."""


class Pages(NamedTuple):
    """Keys and values of histories in a pool of pages; one page may serve several requests.

    What lies in pages that no request needs, and in rows of a page beyond a history's end, reaches no result.

    Attributes:
        k: [blocks, pages, page_rows, heads, dqk], page_rows a multiple of `PAGE_MULTIPLE`.
        v: [blocks, pages, page_rows, heads, dv].
        table: int32[R, max_pages], the pages of each request's history in order, the same for every block; entries
            that a history does not reach mean nothing, but are numbers of pages. A history ends where its row ends.
        time: int32[blocks, pages, page_rows], seconds; None where no bias reads them.
    """

    k: jax.Array
    v: jax.Array
    table: jax.Array
    time: jax.Array | None = None

    @property
    def times(self) -> jax.Array:
        """`time`. Raises ValueError where there is none."""
        if self.time is None:
            raise ValueError("a bias reads the times of the history, and its pages have none")
        return self.time

    @property
    def page_rows(self) -> int:
        """Rows of a page."""
        return int(self.k.shape[2])

    @property
    def capacity(self) -> int:
        """Rows of the longest history that the table has room for."""
        return int(self.table.shape[1]) * self.page_rows


Activation = Softmax | Silu
Bias = LogBias | TableBias
