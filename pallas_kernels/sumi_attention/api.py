"""The public entry of SUMI attention."""

from __future__ import annotations

import jax

from flame_jax.packing import HISTORY_LENGTH
from flame_jax.pallas_kernels.kernels import Implementation
from flame_jax.pallas_kernels.sumi_attention import reference
from flame_jax.pallas_kernels.sumi_attention.types import PAGE_MULTIPLE, Activation, Bias, Pages


def sumi_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    time: jax.Array,
    *,
    activation: Activation,
    bias: Bias | None = None,
    causal: bool = False,
    align: int,
    window: int,
    tiles_at_once: int = 1,
    history: Pages | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """Attention of packed requests: history sees history, a candidate sees the whole history and itself.

    With `Softmax` (docs/models.md, after Climber section 3.2): logits `q . k + bias` over the history and
    `q . k` for a candidate's own key. With `Silu` (HSTU): `scale * q . k + bias` for every key seen.

    Args:
        q: [blocks, Q, heads, dqk], the last Q token rows of the batch (Q = T: all of them).
        k: [blocks, T, heads, dqk].
        v: [blocks, T, heads, dv].
        rows: int32[R, 5 + blocks], the packed layout's request rows.
        time: int32[blocks, T], seconds; a candidate's is its request's time.
        causal: a history row sees the history up to itself only.
        align: the layout's alignment; T and Q are multiples of it.
        window: longest history of any request, in rows.
        tiles_at_once: query tiles computed together: faster where memory allows; equal bits in every placement are
            promised for 1 only. `xla` only.
        history: keys and values of histories, where they are not among the token rows: then T = Q are candidate rows
            alone, `rows` has nothing to say with its history starts, and `causal` means nothing.
        implementation: `mosaic` needs a Hopper GPU and `mosaic.misfit` to find nothing.

    Returns:
        [blocks, Q, heads, dv] in v's dtype. Rows that belong to no request are finite and mean nothing.

    Raises:
        ValueError: T or Q is not a multiple of `align`; `history` does not fit the rest, or lacks
            times that a bias reads.
    """
    if k.shape[1] % align or q.shape[1] % align:
        raise ValueError(f"token rows {k.shape[1]} and query rows {q.shape[1]} must be multiples of {align}")
    if history is not None:
        _check_pages(history, q, k)
        held = history.table.shape[1] * history.page_rows
        rows = rows.at[:, HISTORY_LENGTH:].min(held)  # or else keys would come from another request's row of the table
    if implementation == "mosaic":
        from flame_jax.pallas_kernels.sumi_attention import mosaic

        return mosaic.sumi_attention(
            q, k, v, rows, time, activation=activation, bias=bias, causal=causal, align=align, history=history
        )
    return reference.sumi_attention(
        q,
        k,
        v,
        rows,
        time,
        activation=activation,
        bias=bias,
        causal=causal,
        align=align,
        window=window,
        tiles_at_once=tiles_at_once,
        history=history,
    )


def _check_pages(history: Pages, q: jax.Array, k: jax.Array) -> None:
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"with a history in pages the {k.shape[1]} token rows are the {q.shape[1]} query rows")
    if history.page_rows % PAGE_MULTIPLE:
        raise ValueError(f"a page of {history.page_rows} rows is no multiple of {PAGE_MULTIPLE}")
