"""Attention in PyTorch on regular batches: matrices, SDPA and FlexAttention; see `attention` and `silu` for what it is.

Importable only where torch is. Heads come before rows: q [n, heads, nq, dim], k and v [n, heads, h + c, dim], where n
counts blocks times requests and queries are the last nq rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from bench.baselines.attention import MASKED


class Context(NamedTuple):
    """What does not depend on the layer.

    Attributes:
        time: int32[n, h + c], a candidate's is its request's.
        distance: [h + c, keys], log2(1 + distance in position).
        age: [n, h + c, keys], log2(1 + distance in time); keys are all or, for split forms, the history.
        masks: FlexAttention's for all query rows, and for the candidates alone.
        history: history rows (h).
    """

    time: Tensor
    distance: Tensor
    age: Tensor
    masks: tuple[BlockMask, BlockMask] | None
    history: int


class Coefficients(NamedTuple):
    """One layer's: bias [n, heads, 3], (alpha, beta, gamma), divided by the temperature already."""

    bias: Tensor

    def added(self, context: Context, rows: int) -> Tensor:
        """float32[n, heads, rows, keys] of the last rows."""
        alpha, beta, gamma = self.bias[..., None, None].unbind(2)
        return alpha * context.distance[-rows:] + beta * context.age[:, None, -rows:] + gamma


Attend = Callable[[Tensor, Tensor, Tensor, Coefficients, Context], Tensor]
"""q (divided by the temperature already), k, v, ... -> [n, heads, nq, dim]."""


class Form(NamedTuple):
    """One form of attention.

    Attributes:
        every_key: logs are wanted for all h + c keys, not only for the history.
        logs: logs are wanted at all.
        flex: FlexAttention's masks are wanted.
    """

    attend: Attend
    every_key: bool = False
    logs: bool = True
    flex: bool = False


def masked_bias(coefficients: Coefficients, context: Context, rows: int) -> Tensor:
    """float32[n, heads, rows, h + c]: bias / temperature towards history, 0 for the own key, else masked."""
    key = torch.arange(context.time.shape[1], device=context.time.device)
    own = torch.where(key == key[-rows:, None], 0.0, MASKED)
    return torch.where(key < context.history, coefficients.added(context, rows), own)


def dense(q: Tensor, k: Tensor, v: Tensor, coefficients: Coefficients, context: Context) -> Tensor:
    """One masked softmax."""
    logits = (q @ k.mT).float() + masked_bias(coefficients, context, q.shape[2])
    return logits.softmax(-1).to(v.dtype) @ v


def split(q: Tensor, k: Tensor, v: Tensor, coefficients: Coefficients, context: Context) -> Tensor:
    """All rows against the history as a matrix, a candidate's own key as a dot product."""
    h, rows = context.history, q.shape[2]
    logits = (q @ k[:, :, :h].mT).float() + coefficients.added(context, rows)
    row = torch.arange(k.shape[2] - rows, k.shape[2], device=q.device)
    own = (q.float() * k[:, :, -rows:].float()).sum(-1, keepdim=True)
    own = torch.where(row[:, None] < h, MASKED, own)
    peak = torch.maximum(logits.amax(-1, keepdim=True), own)
    weights, own_weight = (logits - peak).exp(), (own - peak).exp()
    total = weights.sum(-1, keepdim=True) + own_weight
    # Divided before the product: its epilogue is not fused into it.
    return (weights / total).to(v.dtype) @ v[:, :, :h] + ((own_weight / total) * v[:, :, -rows:]).to(v.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, coefficients: Coefficients, context: Context) -> Tensor:
    """`scaled_dot_product_attention` with an additive mask, the kernel chosen by torch."""
    mask = masked_bias(coefficients, context, q.shape[2]).to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, coefficients: Coefficients, context: Context) -> Tensor:
    """The same by cuDNN."""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        return sdpa(q, k, v, coefficients, context)


def flex(q: Tensor, k: Tensor, v: Tensor, coefficients: Coefficients, context: Context) -> Tensor:
    """FlexAttention: the bias computed inside, blocks of keys that nobody sees left out."""
    rows = q.shape[2]
    assert context.masks is not None
    mask = context.masks[0 if rows == k.shape[2] else 1]
    out: Tensor = flex_attention(q, k, v, score_mod(coefficients, context, rows), mask, scale=1.0)
    return out


def flex_split(q: Tensor, k: Tensor, v: Tensor, coefficients: Coefficients, context: Context) -> Tensor:
    """FlexAttention against the history; a candidate's own key joins by the sum of exponentials."""
    h, rows = context.history, q.shape[2]
    candidates = k.shape[2] - h
    modify = score_mod(coefficients, context, rows)
    out, aux = flex_attention(q, k[:, :, :h], v[:, :, :h], modify, scale=1.0, return_aux=AuxRequest(lse=True))
    own = (q[:, :, -candidates:].float() * k[:, :, h:].float()).sum(-1)
    share = (own - aux.lse[:, :, -candidates:]).sigmoid()[..., None]
    ranked = out[:, :, -candidates:] * (1 - share) + v[:, :, h:] * share
    return torch.cat([out[:, :, :-candidates], ranked.to(out.dtype)], 2)


def score_mod(coefficients: Coefficients, context: Context, rows: int) -> Callable[..., Tensor]:
    """The bias as FlexAttention wants it: on the fly, from positions and times."""
    bias, time, h = coefficients.bias, context.time, context.history
    first = time.shape[1] - rows

    def modify(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        far = (torch.clamp(query + first, max=h) - key).abs()
        old = (time[batch, query + first] - time[batch, key]).abs()
        alpha, beta, gamma = (bias[batch, head, i] for i in range(3))
        added = alpha * torch.log2(1.0 + far.float()) + beta * torch.log2(1.0 + old.float()) + gamma
        return torch.where(key < h, score + added, score)

    return modify


def flex_masks(tokens: int, history: int, device: torch.device) -> tuple[BlockMask, BlockMask]:
    """`Context.masks`."""

    def mask(rows: int) -> BlockMask:
        first = tokens - rows

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key < history) | (key == query + first)

        return create_block_mask(seen, None, None, rows, tokens, device=device)

    return mask(tokens), mask(tokens - history)


CLIMBER = {
    "dense": Form(dense, every_key=True),
    "split": Form(split),
    "sdpa": Form(sdpa, every_key=True),
    "sdpa_cudnn": Form(sdpa_cudnn, every_key=True),
    "flex": Form(flex, logs=False, flex=True),
    "flex_split": Form(flex_split, logs=False),
}


class Silu(NamedTuple):
    """HSTU's: weights = silu(scale * q . k) / divisor."""

    scale: float
    divisor: float
    history: int

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """float32[n, heads, nq, keys]."""
        return functional.silu((q @ k.mT).float() * self.scale) / self.divisor


def silu_dense(q: Tensor, k: Tensor, v: Tensor, silu: Silu) -> Tensor:
    """One matrix of all queries by all keys."""
    key = torch.arange(k.shape[2], device=q.device)
    query = key[-q.shape[2] :, None]
    seen = torch.where(query < silu.history, key <= query, (key < silu.history) | (key == query))
    return torch.where(seen, silu.weights(q, k), 0.0).to(v.dtype) @ v


def silu_split(q: Tensor, k: Tensor, v: Tensor, silu: Silu, *, chunk: int = 1024) -> Tensor:
    """History in chunks against the keys up to the last of them, candidates by history, own keys as dot products."""
    h, rows = silu.history, q.shape[2]
    candidates, parts = k.shape[2] - h, []
    for start in range(0, rows - candidates, chunk):
        end = min(start + chunk, h)
        key = torch.arange(end, device=q.device)
        weights = torch.where(key <= key[start:, None], silu.weights(q[:, :, start:end], k[:, :, :end]), 0.0)
        parts.append(weights.to(v.dtype) @ v[:, :, :end])
    ranked = q[:, :, -candidates:]
    own = (ranked.float() * k[:, :, h:].float()).sum(-1, keepdim=True)
    share = functional.silu(own * silu.scale) / silu.divisor
    mixed = silu.weights(ranked, k[:, :, :h]).to(v.dtype) @ v[:, :, :h]
    return torch.cat([*parts, mixed + (share * v[:, :, h:]).to(v.dtype)], 2)


HSTU = {"dense": silu_dense, "split": silu_split}
"""FlexAttention and SDPA are softmax attention: they can't express it."""
