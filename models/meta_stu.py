"""Weights of meta-recsys generative-recommenders' STU stack (`modules/stu.py`): their names, and the stack alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flame_jax.config import HstuConfig, ModelConfig
from flame_jax.models.hstu_layer import hstu_layer
from flame_jax.models.public_layers import PublicStack, Sizes, Spelling, Spellings
from flame_jax.packing import CANDIDATE_COUNT, CANDIDATE_START, HISTORY_LENGTH, HISTORY_START, row_width
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import Silu

ALIGN = 16

Stack = Callable[[jax.Array | np.ndarray, np.ndarray], jax.Array]


def _spell(sizes: Sizes, width: int) -> Spellings:
    values, mixed = sizes.values, sizes.mixed
    return {
        "uvqk_w": (Spelling("_uvqk_weight", (width, mixed)),),
        "uvqk_b": (Spelling("_uvqk_beta", (mixed,)),),
        "input_scale": (Spelling("_input_norm_weight", (width,)),),
        "input_shift": (Spelling("_input_norm_bias", (width,)),),
        "out_w": (Spelling("_output_weight", (3 * values, width)),),
        "output_scale": (Spelling("_output_norm_weight", (values,)),),
        "output_shift": (Spelling("_output_norm_bias", (values,)),),
    }


META_STU = PublicStack("an STU stack", "_stu_layers", _spell)


def layers_from_meta(
    state: Mapping[str, np.ndarray], *, num_heads: int, attention_dim: int, hidden_dim: int
) -> dict[str, np.ndarray]:
    """`_stu_layers.{i}.<name>` tensors to our stacked `layers/...` weights (docs/models.md, `dlrm_v3`), float32.

    They may lie under any one prefix.

    Raises:
        ValueError: naming every missing, extra and misshapen tensor.
    """
    return META_STU.layers(state, Sizes(num_heads, attention_dim, hidden_dim))


def stack_from_meta(
    state: Mapping[str, np.ndarray],
    *,
    num_heads: int,
    attention_dim: int,
    hidden_dim: int,
    max_seq_len: int,
    dtype: str = "float32",
) -> Stack:
    """The layers of an STU stack as a function.

    Args:
        state: the state dict of an `STUStack`.
        max_seq_len: the constant that attention weights are divided by.
        dtype: `float32` or `bfloat16`, of products and activations.

    Returns:
        `stack(x, segments)`: x [T, D]; segments int32[R, 4], rows (history_start, history_len,
        candidate_start, candidate_len) that lie anywhere in x and do not overlap. Gives [T, D] in `dtype`;
        rows of no segment are 0. It compiles once per power-of-two size.

    Raises:
        ValueError: the state does not fit; from the function, segments that leave x or overlap.
    """
    weights = layers_from_meta(state, num_heads=num_heads, attention_dim=attention_dim, hidden_dim=hidden_dim)
    depth, width = weights["input_scale"].shape
    config = ModelConfig(
        architecture="hstu",
        width=width,
        layers=depth,
        heads=num_heads,
        head_dim=attention_dim,
        hstu=HstuConfig(variant="dlrm_v3", value_dim=hidden_dim, attention_divisor=float(max_seq_len)),
    )
    on_device = {name: jnp.asarray(w) for name, w in weights.items()}
    run = jax.jit(partial(_run, config), static_argnames="window")

    def stack(x: jax.Array | np.ndarray, segments: np.ndarray) -> jax.Array:
        source, rows, window = _repack(np.asarray(segments), len(x))
        packed = jnp.where(source[:, None] < 0, 0, jnp.asarray(x, dtype)[np.maximum(source, 0)])
        out = run(on_device, packed, rows, window=window)
        used = np.flatnonzero(source >= 0)
        return jnp.zeros(x.shape, dtype).at[source[used]].set(out[used])

    return stack


def _run(
    config: ModelConfig, weights: dict[str, jax.Array], x: jax.Array, rows: jax.Array, *, window: int
) -> jax.Array:
    attention = partial(
        sumi_attention,
        rows=rows,
        time=jnp.zeros((1, len(x)), jnp.int32),
        activation=Silu(config.head_dim**-0.5, config.hstu.attention_divisor),
        causal=True,
        align=ALIGN,
        window=window,
    )
    x = x[None]
    for index in range(config.layers):
        x = hstu_layer(x, weights, index, attention, config=config)
    return x[0]


def _repack(segments: np.ndarray, rows_of_x: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Lay every history, then every candidate list, at aligned rows.

    Returns:
        int32[T'] row of x per packed row, -1 for padding; the request rows; the window.
    """
    if segments.ndim != 2 or segments.shape[1] != 4 or (segments < 0).any():
        raise ValueError(f"segments must be int32[R, 4] and not negative, not {segments.shape}")
    rows = np.zeros((len(segments), row_width(1)), np.int32)
    pieces: list[np.ndarray] = []
    at = 0
    for starts, lengths, column in ((0, 1, HISTORY_START), (2, 3, CANDIDATE_START)):
        for number, segment in enumerate(segments):
            start, length = int(segment[starts]), int(segment[lengths])
            rows[number, column] = at
            room = -(-length // ALIGN) * ALIGN
            pieces.append(np.concatenate([np.arange(start, start + length), np.full(room - length, -1)]))
            at += room
    rows[:, HISTORY_LENGTH], rows[:, CANDIDATE_COUNT] = segments[:, 1], segments[:, 3]
    source = np.concatenate([*pieces, np.empty(0, np.int64)]).astype(np.int32)
    used = source[source >= 0]
    if used.size and (used.max() >= rows_of_x or len(np.unique(used)) != len(used)):
        raise ValueError(f"segments leave x of {rows_of_x} rows, or overlap")
    size = _power_of_two(max(len(source), ALIGN))
    source = np.concatenate([source, np.full(size - len(source), -1, np.int32)])
    return source, rows, _power_of_two(max(int(segments[:, 1].max(initial=0)), ALIGN))


def _power_of_two(rows: int) -> int:
    return 1 << (rows - 1).bit_length()
