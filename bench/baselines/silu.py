"""HSTU's pointwise attention on regular batches: dense matrices, split, and split with a causal half left out.

History rows come first, [0, h) of the token axis; a history row sees the history up to itself, a candidate the whole
history and itself. Queries are the last nq rows.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Silu(NamedTuple):
    """weights = silu(scale * q . k) / divisor, of h history rows."""

    scale: float
    divisor: float
    history: int

    def weights(self, q: jax.Array, k: jax.Array, seen: jax.Array, *, wide: bool) -> jax.Array:
        """[B, heads, nq, keys] in q's dtype of q [B, nq, heads, dim], k [B, keys, heads, dim], seen bool[nq, keys].

        Args:
            wide: logits leave the matrix product as float32, not in q's dtype.
        """
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32 if wide else q.dtype)
        weights = jax.nn.silu(logits.astype(jnp.float32) * self.scale) / self.divisor
        return jnp.where(seen, weights, 0.0).astype(q.dtype)


class Attention(Protocol):
    """One form."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, silu: Silu) -> jax.Array:
        """q [B, nq, heads, dim], k [B, h + c, heads, dim], v [B, h + c, heads, dv] -> [B, nq, heads, dv]."""


class Given(NamedTuple):
    """Candidates alone, against a history's keys and values that are there already.

    Attributes:
        wide: see `Silu.weights`.
    """

    wide: bool = True

    def __call__(
        self, q: jax.Array, own: tuple[jax.Array, jax.Array], history: tuple[jax.Array, jax.Array], silu: Silu
    ) -> jax.Array:
        """float32[B, c, heads, dv] of q [B, c, heads, dim], the candidates' own keys and values, and the history's."""
        (own_k, own_v), (k, v) = own, history
        score = jnp.einsum("bqhd,bqhd->bqh", q, own_k, preferred_element_type=jnp.float32)
        share = (jax.nn.silu(score * silu.scale) / silu.divisor)[..., None]
        return _mixed(silu.weights(q, k, jnp.ones((1, 1), bool), wide=self.wide), v) + share * own_v


class Dense(NamedTuple):
    """One matrix of all queries by all keys."""

    wide: bool = True

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, silu: Silu) -> jax.Array:
        """See `Attention`."""
        query, key = jnp.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None], jnp.arange(k.shape[1])
        seen = jnp.where(query < silu.history, key <= query, (key < silu.history) | (key == query))
        return _mixed(silu.weights(q, k, seen, wide=self.wide), v).astype(v.dtype)


class Split(NamedTuple):
    """History by history and candidates by history as matrices, a candidate's own key as a dot product.

    Attributes:
        chunk: history rows that are computed together, against the keys up to the last of them; 0 for all at once.
        wide: see `Silu.weights`.
    """

    chunk: int = 0
    wide: bool = True

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, silu: Silu) -> jax.Array:
        """See `Attention`."""
        h = silu.history
        candidates = k.shape[1] - h
        step, parts = self.chunk or h, []
        for start in range(0, q.shape[1] - candidates, step):
            end = min(start + step, h)
            causal = jnp.arange(end) <= jnp.arange(start, end)[:, None]
            weights = silu.weights(q[:, start:end], k[:, :end], causal, wide=self.wide)
            parts.append(_mixed(weights, v[:, :end]))
        own, history = (k[:, h:], v[:, h:]), (k[:, :h], v[:, :h])
        parts.append(Given(self.wide)(q[:, -candidates:], own, history, silu))
        return jnp.concatenate([part.astype(v.dtype) for part in parts], axis=1)


def _mixed(weights: jax.Array, v: jax.Array) -> jax.Array:
    """float32[B, nq, heads, dv]."""
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32)
