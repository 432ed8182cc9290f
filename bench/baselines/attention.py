"""Climber's attention on regular batches: dense matrices, a split softmax, cuDNN and tokamax.

Every form computes the same thing, see docs/models.md: a history row sees the history, a candidate the history and its
own key. Rows [0, h) of the token axis are history, the rest candidates; queries are the last rows of it, all or the
candidates alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Finite, and in bfloat16's range."""


class Bias(NamedTuple):
    """One layer's logits besides q . k, for the nq last token rows.

    Attributes:
        distance: [nq, keys], log2(1 + distance in position).
        age: [blocks, B, nq, keys], log2(1 + distance in time).
        coefficients: float32[blocks, B, heads, 3], (alpha, beta, gamma).
        inverse: float32[blocks, B, heads], 1 / temperature.
        history: history rows (h).
    """

    distance: jax.Array
    age: jax.Array
    coefficients: jax.Array
    inverse: jax.Array
    history: int

    def last(self, rows: int) -> Bias:
        """The same for the last query rows."""
        return self._replace(distance=self.distance[-rows:], age=self.age[..., -rows:, :])

    def added(self) -> jax.Array:
        """float32[blocks, B, heads, nq, keys]: bias / temperature."""
        scaled = self.coefficients * self.inverse[..., None]
        alpha, beta, gamma = jnp.moveaxis(scaled[..., None, None, :], -1, 0)
        total: jax.Array = alpha * self.distance + beta * self.age[:, :, None] + gamma
        return total


class Attention(Protocol):
    """One form."""

    @property
    def every_key(self) -> bool:
        """The bias is wanted for all h + c keys, not only for the history."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
        """q [blocks, B, nq, heads, dim], k and v [blocks, B, h + c, heads, dim] -> [blocks, B, nq, heads, dim]."""


class DenseMasked(NamedTuple):
    """One masked softmax over all h + c keys, the bias an additive matrix.

    Attributes:
        wide: logits leave the matrix product as float32, not in q's dtype.
    """

    wide: bool = True
    every_key: bool = True

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
        """See `Attention`."""
        logits = _products(q, k, self.wide) * bias.inverse[..., None, None]
        shares = jax.nn.softmax(logits + masked_bias(bias), axis=-1)
        return jnp.einsum("zbhqk,zbkhd->zbqhd", shares.astype(v.dtype), v)


class SplitSoftmax(NamedTuple):
    """All rows against the history as a matrix, a candidate's own key as a dot product.

    Attributes:
        wide: logits leave the matrix product as float32, not in q's dtype.
    """

    wide: bool = True
    every_key: bool = False

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
        """See `Attention`."""
        h, rows = bias.history, q.shape[2]
        logits = _products(q, k[:, :, :h], self.wide) * bias.inverse[..., None, None] + bias.added()
        own = jnp.moveaxis(own_logits(q, k, bias), -1, 2)[..., None]
        own = jnp.where(jnp.arange(k.shape[2] - rows, k.shape[2])[:, None] < h, MASKED, own)
        peak = jnp.maximum(logits.max(axis=-1, keepdims=True), own)
        weights, own_weight = jnp.exp(logits - peak), jnp.exp(own - peak)
        total = weights.sum(axis=-1, keepdims=True) + own_weight
        mixed = jnp.einsum(
            "zbhqk,zbkhd->zbqhd", weights.astype(v.dtype), v[:, :, :h], preferred_element_type=jnp.float32
        )
        mixed += jnp.moveaxis(own_weight, 2, 3) * v[:, :, -rows:]
        return (mixed / jnp.moveaxis(total, 2, 3)).astype(v.dtype)


class SplitMerged(NamedTuple):
    """The same with an ordinary softmax over the history, which XLA makes one kernel of; own keys join afterwards.

    Attributes:
        wide: logits leave the matrix product as float32, not in q's dtype.
    """

    wide: bool = True
    every_key: bool = False

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
        """See `Attention`."""
        h, candidates = bias.history, k.shape[2] - bias.history
        logits = _products(q, k[:, :, :h], self.wide) * bias.inverse[..., None, None] + bias.added()
        shares = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        out = jnp.einsum("zbhqk,zbkhd->zbqhd", shares, v[:, :, :h])
        total = jnp.moveaxis(jax.nn.logsumexp(logits[..., -candidates:, :], axis=-1), 2, 3)
        return join_own(out, total, q, k, v, bias)


class Flash(Protocol):
    """A flash kernel."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, *, total: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """softmax(q . k + bias) v.

        Args:
            q: [n, nq, heads, dim].
            k: [n, keys, heads, dim], as v.
            bias: [n, heads, nq, keys] in q's dtype.
            total: also return float32[n, nq, heads], the logarithm of the sum of the logits' exponentials.
        """


class FlashMasked(NamedTuple):
    """A flash kernel over all h + c keys; its bias carries ours and the mask."""

    kernel: Flash
    every_key: bool = True

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
        """See `Attention`."""
        matrix = _joined(masked_bias(bias)).astype(q.dtype)
        return self.kernel(_joined(_scaled(q, bias)), _joined(k), _joined(v), matrix, total=False)[0].reshape(q.shape)


class FlashSplit(NamedTuple):
    """A flash kernel of all rows against the history; a candidate's own key joins by the sum of exponentials."""

    kernel: Flash
    every_key: bool = False

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
        """See `Attention`."""
        h, candidates = bias.history, k.shape[2] - bias.history
        matrix = _joined(bias.added()).astype(q.dtype)
        keys, values = _joined(k[:, :, :h]), _joined(v[:, :, :h])
        out, total = self.kernel(_joined(_scaled(q, bias)), keys, values, matrix, total=True)
        assert total is not None
        total = total.reshape(q.shape[:-1])[:, :, -candidates:]
        return join_own(out.reshape(q.shape), total, q, k, v, bias)


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, *, total: bool
) -> tuple[jax.Array, jax.Array | None]:
    """cuDNN, see `Flash`."""
    if not total:
        return jax.nn.dot_product_attention(q, k, v, bias, scale=1.0, implementation="cudnn"), None
    # The public function rounds the sums to q's dtype.
    from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention

    out, sums = dot_product_attention(q, k, v, bias, scale=1.0, return_residual=True)
    return out, jnp.swapaxes(sums, 1, 2)


def xla(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, *, total: bool
) -> tuple[jax.Array, jax.Array | None]:
    """What stands in for a flash kernel where there is none, see `Flash`."""
    return jax.nn.dot_product_attention(q, k, v, bias, scale=1.0, implementation="xla", return_residual=True)


class Tokamax(NamedTuple):
    """tokamax, see `Flash`.

    Attributes:
        implementation: one of tokamax's names.
    """

    implementation: str = "mosaic_gpu"

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, *, total: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """See `Flash`."""
        # The public function doesn't give the residuals that its operations have.
        from tokamax._src.ops.attention.api import IMPLEMENTATIONS

        operation: Any = IMPLEMENTATIONS[self.implementation]
        if not total:
            return operation(q, k, v, bias=bias, logits_scale=1.0), None
        out, (peak, sums) = operation(q, k, v, bias=bias, logits_scale=1.0, return_residuals=True)
        return out, jnp.swapaxes(peak + jnp.log(sums), 1, 2)


def masked_bias(bias: Bias) -> jax.Array:
    """float32[blocks, B, heads, nq, h + c]: bias / temperature towards history, 0 for the own key, else masked."""
    rows, keys = bias.distance.shape
    query, key = jnp.arange(keys - rows, keys)[:, None], jnp.arange(keys)
    return jnp.where(key < bias.history, bias.added(), jnp.where(key == query, 0.0, MASKED))


def join_own(out: jax.Array, total: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias) -> jax.Array:
    """Attention to the history joined by the candidates' own keys.

    Args:
        out: [blocks, B, nq, heads, dim], attention to the history alone.
        total: float32[blocks, B, c, heads], the candidates' logarithms of the sums of exponentials.
    """
    candidates = total.shape[2]
    share = jax.nn.sigmoid(own_logits(q[:, :, -candidates:], k, bias) - total)[..., None]
    ranked = out[:, :, -candidates:] * (1 - share) + v[:, :, -candidates:] * share
    return jnp.concatenate([out[:, :, :-candidates], ranked.astype(v.dtype)], axis=2)


def own_logits(q: jax.Array, k: jax.Array, bias: Bias) -> jax.Array:
    """float32[blocks, B, nq, heads]: each row's logit of its own key."""
    own = jnp.einsum("zbqhd,zbqhd->zbqh", q, k[:, :, -q.shape[2] :], preferred_element_type=jnp.float32)
    return own * bias.inverse[:, :, None]


def _products(q: jax.Array, k: jax.Array, wide: bool) -> jax.Array:
    """float32[blocks, B, heads, nq, keys]."""
    logits = jnp.einsum("zbqhd,zbkhd->zbhqk", q, k, preferred_element_type=jnp.float32 if wide else q.dtype)
    return logits.astype(jnp.float32)


def _scaled(q: jax.Array, bias: Bias) -> jax.Array:
    """q / temperature."""
    return (q * bias.inverse[:, :, None, :, None]).astype(q.dtype)


def _joined(x: jax.Array) -> jax.Array:
    """[blocks, B, ...] -> [blocks * B, ...]."""
    return x.reshape(-1, *x.shape[2:])
