"""The public entry of SUMI attention."""

from __future__ import annotations

import jax

from flame_jax.pallas_kernels.sumi_attention import reference


def sumi_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    time: jax.Array,
    *,
    temperature: jax.Array,
    bias: jax.Array | None,
    align: int,
    window: int,
) -> jax.Array:
    """Softmax attention of packed requests: history sees history, a candidate sees history and itself.

    With `s = (q . k + alpha*log2(1+|dp|) + beta*log2(1+|dt|) + gamma) / temperature` over the history, and
    `s = q . k / temperature` for a candidate's own key (docs/models.md, after Climber section 3.2).

    Args:
        q: [blocks, Q, heads, head_dim], the last Q token rows of the batch (Q = T: all of them).
        k, v: [blocks, T, heads, head_dim].
        rows: int32[R, 5 + blocks], the packed layout's request rows.
        time: int32[blocks, T], seconds; a candidate's is its request's time.
        temperature: float32[blocks, scenarios, heads], positive.
        bias: float32[blocks, scenarios, heads, 3] (alpha, beta, gamma), or None for no bias.
        align: the layout's alignment; T and Q are multiples of it.
        window: longest history of any request, in rows.

    Returns:
        [blocks, Q, heads, head_dim] in v's dtype. Rows that belong to no request are finite and mean nothing.

    Raises:
        ValueError: T or Q is not a multiple of `align`.
    """
    if k.shape[1] % align or q.shape[1] % align:
        raise ValueError(f"token rows {k.shape[1]} and query rows {q.shape[1]} must be multiples of {align}")
    return reference.sumi_attention(q, k, v, rows, time, temperature=temperature, bias=bias, align=align, window=window)
