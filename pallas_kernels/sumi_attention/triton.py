"""SUMI attention as one Triton kernel, `TableBias` included; docs/kernels.md, "SUMI attention"."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from flame_jax.pallas_kernels.sumi_attention import reference, schedule
from flame_jax.pallas_kernels.sumi_attention.types import Activation, Bias, LogBias, Pages, Silu, Softmax, TableBias
from flame_jax.pallas_kernels.time_buckets import LOG_THRESHOLDS, LOG_WIDTH

# A Triton kernel reads globals of this type only.
FIRST_ROW = tl.constexpr(schedule.FIRST_ROW)
ROWS = tl.constexpr(schedule.ROWS)
KEY_START = tl.constexpr(schedule.KEY_START)
POSITION = tl.constexpr(schedule.POSITION)
IS_HISTORY = tl.constexpr(schedule.IS_HISTORY)
JOB_SCENARIO = tl.constexpr(schedule.JOB_SCENARIO)
JOB_LENGTH = tl.constexpr(schedule.JOB_LENGTH)
MASKED = tl.constexpr(reference.MASKED)
LAST_BUCKET = tl.constexpr(len(LOG_THRESHOLDS))
BUCKETS_PER_LOG2 = tl.constexpr(math.log(2) / LOG_WIDTH)

PTX_VERSION = 86
"""Of the code that Triton emits: new enough for Hopper, and any CUDA from 12.7 on takes it. Named, because Triton would
ask the ptxas it comes with, which may be newer than the driver."""


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        queries: query rows of a program.
        keys: key rows of a step.
        warps: of a program.
        stages: steps in flight.
    """

    queries: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 2


def sumi_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    time: jax.Array,
    *,
    activation: Activation,
    bias: Bias | None,
    causal: bool,
    align: int,
    history: Pages | None = None,
    tiling: Tiling | None = None,
    compute_capability: int | None = None,
) -> jax.Array:
    """See `api.sumi_attention`; bfloat16 or float16, head dimensions 32, 64, 128 and 256.

    Args:
        tiling: `queries` is a multiple of `align`.
        compute_capability: 90 for an H100; by default that of this machine's GPU, so one must be there.

    Raises:
        ValueError: a history in pages; `tiling` does not fit the alignment.
    """
    if history is not None:
        raise ValueError("a history in pages is for the reference and for Mosaic GPU only, not for Triton")
    blocks, tokens, heads, qk_dim = k.shape
    queries, v_dim = q.shape[1], v.shape[-1]
    tiling = tiling or Tiling()
    if tiling.queries % align:
        raise ValueError(f"tiling.queries is {tiling.queries}, which is no multiple of the layout's alignment {align}")
    work = schedule.jobs(rows, align=align, first=tokens - queries, last=tokens, size=tiling.queries)
    coefficients = _coefficients(activation, bias, blocks, heads)
    position_table, time_table, thresholds = _tables(bias)
    out: jax.Array = jax_triton.triton_call(
        *(work, coefficients, q, k, v, time, position_table, time_table, thresholds),
        kernel=_sumi_attention,
        out_type=jax.ShapeDtypeStruct((blocks, queries, heads, v_dim), v.dtype),
        grid=(len(work), blocks * heads),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        compute_capability=compute_capability,
        backend_options={"enable_fp_fusion": True, "ptx_version": PTX_VERSION},
        BLOCKS=blocks,
        TOKENS=tokens,
        QUERIES=queries,
        HEADS=heads,
        SCENARIOS=coefficients.shape[1],
        QK_DIM=qk_dim,
        V_DIM=v_dim,
        SOFTMAX=isinstance(activation, Softmax),
        DIVISOR=activation.divisor if isinstance(activation, Silu) else 1.0,
        BIAS={LogBias: "log", TableBias: "table"}.get(type(bias), "none"),
        LAST_POSITION=len(position_table) // 2 if position_table is not None else 0,
        CAUSAL=causal,
        BLOCK_Q=tiling.queries,
        BLOCK_K=tiling.keys,
    )
    return out


def _coefficients(activation: Activation, bias: Bias | None, blocks: int, heads: int) -> jax.Array:
    """float32[blocks, scenarios, heads, 4]: factors of q . k and of the bias's three terms; softmax counts in log2."""
    if isinstance(activation, Softmax):
        logit = math.log2(math.e) / activation.own
        scale = logit
    else:
        logit = jnp.ones((blocks, 1, heads), jnp.float32)
        scale = logit * activation.scale
    if isinstance(bias, LogBias):
        terms = bias.own * logit[..., None]
    else:
        terms = logit[..., None] * jnp.array([1.0, 1.0, 0.0], jnp.float32)
    scale = jnp.broadcast_to(scale[..., None], (*terms.shape[:-1], 1))
    return jnp.concatenate([scale, terms], axis=-1).astype(jnp.float32)


def _tables(bias: Bias | None) -> tuple[jax.Array, jax.Array, jax.Array] | tuple[None, None, None]:
    """Of a `TableBias`: values by position, values by any bucket there is, smallest |dt| of each bucket but 0."""
    if not isinstance(bias, TableBias):
        return None, None, None
    bucket = jnp.minimum(jnp.arange(len(LOG_THRESHOLDS) + 1), len(bias.time) - 1)
    return bias.position, bias.time[bucket], jnp.asarray(LOG_THRESHOLDS)


@triton.jit
def _sumi_attention(
    work,
    coefficients,
    q,
    k,
    v,
    time,
    position_table,
    time_table,
    thresholds,
    out,
    BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    SCENARIOS: tl.constexpr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    DIVISOR: tl.constexpr,
    BIAS: tl.constexpr,
    LAST_POSITION: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One job, one block, one head; rows of `k`, `v` and `time` are counted from the request's first key."""
    job, block, head = tl.program_id(0), tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    work += job * (JOB_LENGTH + BLOCKS)
    rows = tl.load(work + ROWS)
    if rows == 0:
        return
    first_query = (block * QUERIES + tl.load(work + FIRST_ROW)).to(tl.int64)
    first_key = (block * TOKENS + tl.load(work + KEY_START)).to(tl.int64)
    q += (first_query * HEADS + head) * QK_DIM
    k += (first_key * HEADS + head) * QK_DIM
    v += (first_key * HEADS + head) * V_DIM
    out += (first_query * HEADS + head) * V_DIM
    time += first_key
    scenario = tl.minimum(tl.load(work + JOB_SCENARIO), SCENARIOS - 1)
    coefficients += ((block * SCENARIOS + scenario) * HEADS + head) * 4
    scale = tl.load(coefficients)
    factors = (tl.load(coefficients + 1), tl.load(coefficients + 2), tl.load(coefficients + 3))

    position = tl.load(work + POSITION)
    length = tl.load(work + JOB_LENGTH + block)
    is_history = tl.load(work + IS_HISTORY)
    row = tl.arange(0, BLOCK_Q)
    owned = row < rows
    own = position + row
    q_tile = tl.load(_rows(q, row, HEADS, QK_DIM), mask=owned[:, None], other=0.0)
    own_k = tl.load(_rows(k, own, HEADS, QK_DIM), mask=owned[:, None], other=0.0)
    own_v = tl.load(_rows(v, own, HEADS, V_DIM), mask=owned[:, None], other=0.0)
    alone = (own >= length) | (is_history == 0)
    bias = (factors, position_table, time_table, thresholds, LAST_POSITION)
    state = _own_key(q_tile, own_k, own_v, alone, scale, bias, SOFTMAX, BIAS)
    keys = (k, v, time)
    # Not `else`: Triton 3.9 would merge the ends of both branches, and with them what they keep in shared memory.
    if is_history > 0:
        counted = own
        if BIAS == "table":
            counted += (own + 1 < length).to(tl.int32)  # the successor, where there is one
        now = tl.load(time + counted, mask=owned, other=0)
        spans = (length, length, length)
        if CAUSAL:
            spans = (tl.minimum(length, position), tl.minimum(length, position + rows), length)
        state = _attend(
            state, q_tile, keys, scale, bias, own[:, None], now[:, None], spans, HEADS, SOFTMAX, BIAS, CAUSAL, BLOCK_K
        )
    if is_history < 1:
        # To a bias all candidates of a request are the same: one row of it serves the tile.
        now = tl.load(time + position)
        spans = (length, length, length)
        state = _attend(state, q_tile, keys, scale, bias, length, now, spans, HEADS, SOFTMAX, BIAS, False, BLOCK_K)
    mixed, _, total = state
    if SOFTMAX:
        mixed /= total[:, None]
    else:
        mixed /= DIVISOR
    tl.store(_rows(out, row, HEADS, V_DIM), mixed.to(out.dtype.element_ty), mask=owned[:, None])


@triton.jit
def _own_key(q_tile, own_k, own_v, alone, scale, bias, SOFTMAX: tl.constexpr, BIAS: tl.constexpr):
    """The state before the first key: weighted sum of values, and softmax's running maximum and sum.

    A row that is no history row has seen its own key by then; that keeps padding rows finite too.
    """
    logit = tl.sum(q_tile.to(tl.float32) * own_k.to(tl.float32), axis=1) * scale
    if BIAS == "table":
        factors, position_table, time_table, _, LAST_POSITION = bias
        logit += tl.load(position_table + LAST_POSITION) * factors[0] + tl.load(time_table) * factors[1]
    total = tl.where(alone, 1.0, 0.0)
    peak = tl.where(alone, logit, MASKED)
    weight = total if SOFTMAX else _silu(logit) * total
    return own_v.to(tl.float32) * weight[:, None], peak, total


@triton.jit
def _attend(
    state,
    q_tile,
    keys,
    scale,
    bias,
    position,
    now,
    spans,
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Take the keys in. `position` and `now` are the queries': a column of them, or one number for all."""
    mixed, peak, total = state
    k, v, time = keys
    seen_by_all, end, length = spans
    whole = seen_by_all // BLOCK_K * BLOCK_K
    for MASK in tl.static_range(2):
        for start in tl.range(whole if MASK else 0, end if MASK else whole, BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            of_request = key < length if MASK else tl.full((BLOCK_K,), True, tl.int1)
            k_tile = tl.load(_rows(k, key, HEADS, q_tile.shape[1]), mask=of_request[:, None], other=0.0)
            logits = tl.dot(q_tile, tl.trans(k_tile)) * scale
            if BIAS != "none":
                key_time = tl.load(time + key, mask=of_request, other=0)
                logits += _bias(bias, position, now, key[None, :], key_time[None, :], BIAS)
            seen = of_request[None, :]
            if CAUSAL and MASK:
                seen &= key[None, :] <= position
            if SOFTMAX:
                logits = tl.where(seen, logits, MASKED)
                new_peak = tl.maximum(peak, tl.max(logits, axis=1))
                decay = tl.exp2(peak - new_peak)
                weights = tl.exp2(logits - new_peak[:, None])
                total = total * decay + tl.sum(weights, axis=1)
                mixed *= decay[:, None]
                peak = new_peak
            else:
                weights = tl.where(seen, _silu(logits), 0.0)
            # A weight of 0 would not silence a NaN in another request's row.
            v_tile = tl.load(_rows(v, key, HEADS, mixed.shape[1]), mask=of_request[:, None], other=0.0)
            mixed = tl.dot(weights.to(v_tile.dtype), v_tile, mixed)
    return mixed, peak, total


@triton.jit
def _bias(bias, position, now, key, key_time, BIAS: tl.constexpr):
    """float32[queries, keys], or [1, keys] of one number for all queries."""
    factors, position_table, time_table, thresholds, LAST_POSITION = bias
    if BIAS == "log":
        ahead = position.to(tl.float32) - key.to(tl.float32)  # exact, which a difference of times would not be
        first = _log2(1.0 + tl.abs(ahead))
        second = _log2(1.0 + tl.abs((now - key_time).to(tl.float32)))
    else:
        ahead = tl.minimum(tl.maximum(position - key, -LAST_POSITION), LAST_POSITION)
        first = _gather(position_table + (ahead + LAST_POSITION))
        second = _gather(time_table + _log_bucket(now - key_time, thresholds))
    return first * factors[0] + (second * factors[1] + factors[2])


@triton.jit
def _log_bucket(difference, thresholds):
    """`time_buckets.log_bucket` without a last row: the logarithm's is right or one too low, the threshold tells."""
    difference = tl.maximum(tl.abs(difference), 1)
    bucket = (_log2(difference.to(tl.float32)) * BUCKETS_PER_LOG2 - 0.01).to(tl.int32)
    bucket = tl.minimum(bucket, LAST_BUCKET - 1)
    return bucket + (difference >= _gather(thresholds + bucket)).to(tl.int32)


@triton.jit
def _rows(matrix, row, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Addresses of these rows of one head."""
    return matrix + row[:, None] * (HEADS * DIM) + tl.arange(0, DIM)[None, :]


@triton.jit
def _silu(x):
    half = x * 0.5
    return half + half * _tanh(half)


@triton.jit
def _tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _gather(address):
    """Of a table that lies in the L1 cache. Not `tl.load`: the pipeline would bring a tile of it to shared memory."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [address], dtype=address.dtype.element_ty, is_pure=True, pack=1
    )
