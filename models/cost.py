"""What a request costs: useful floating-point operations (what the mask lets through, a multiply-add counted as two)
and bytes; and what an executable costs, whatever its slot holds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flame_jax.config import ModelConfig
from flame_jax.packing import Bucket, Layout, row_width
from flame_jax.schema import FeatureSchema


class Cost(NamedTuple):
    """FLOPs and bytes of one request.

    Attributes:
        linear: the layers' matrix products, every row of the history and of the candidates.
        attention: products of queries with the keys they see, and of weights with values.
        masked: what a dense masked attention spends besides `attention`.
        rest: fusion and head.
        slot_bytes: what the request takes of a slot, and so of the transfer to the device, alignment left out.
        history_bytes: keys and values of its history in every layer, in the computing type: what a cache of them
            would hold.
        score_bytes: its float32 scores.
    """

    linear: int
    attention: int
    masked: int
    rest: int
    slot_bytes: int
    history_bytes: int
    score_bytes: int

    @property
    def layers(self) -> int:
        """The stack's useful FLOPs, the figure that is compared."""
        return self.linear + self.attention

    @property
    def layers_with_masked(self) -> int:
        """The stack's FLOPs when the masked part is computed too."""
        return self.layers + self.masked


def request_cost(config: ModelConfig, schema: FeatureSchema, history: int, candidates: int) -> Cost:
    """Cost of scoring `candidates` items after `history` rows in each block."""
    blocks, rows = len(schema.blocks), history + candidates
    layer = _layer(config)
    pairs = _history_pairs(config, history) + candidates * (history + 1)
    per_pair = layer.per_pair(config.heads)
    stack, key_and_value = config.layers * blocks, config.heads * (layer.query + layer.value)
    return Cost(
        linear=stack * rows * 2 * layer.weights,
        attention=stack * pairs * per_pair,
        masked=stack * (rows * rows - pairs) * per_pair,
        rest=candidates * _rest(config, blocks, len(schema.tasks)),
        slot_bytes=4 * _slot_words(config, schema, history, candidates),
        history_bytes=stack * history * key_and_value * (2 if config.dtype == "bfloat16" else 4),
        score_bytes=4 * candidates * len(schema.tasks),
    )


def bucket_cost(config: ModelConfig, schema: FeatureSchema, layout: Layout, bucket: Bucket) -> int:
    """FLOPs that an executable of `bucket` spends on every batch, however little of it is filled ("padded FLOPs").

    Its matrix products, the weighted value of each row's own key, and the fusion's attention between blocks: all token
    rows go through every layer's projections, the last layer computes candidate rows only, and each query row attends
    to a window of the longest history and to its own key, whatever the mask hides.
    """
    window = min(layout.aligned(schema.history_rows), bucket.tokens)
    layer, blocks = _layer(config), len(schema.blocks)
    computed = (config.layers - 1) * bucket.tokens + bucket.candidates
    projected = config.layers * bucket.tokens * 2 * layer.projection
    finished = computed * (2 * layer.after + (window + 1) * layer.per_pair(config.heads))
    rest = bucket.candidates * (_rest(config, blocks, len(schema.tasks)) + _bits(config, schema, of_items=True))
    return blocks * (projected + finished) + rest + layout.max_requests * _bits(config, schema, of_items=False)


def filled_cost(config: ModelConfig, schema: FeatureSchema, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """int64[n] of `bucket_cost` that requests make use of: no row is padding and no hidden key is read.

    Less than `request_cost`, by the last layer's work on history rows, which no executable does.

    Args:
        history: int64[n], history rows of each request.
        candidates: int64[n].
    """
    layer, blocks = _layer(config), len(schema.blocks)
    before = config.layers - 1
    pairs = before * _history_pairs(config, history) + config.layers * candidates * (history + 1)
    projected = config.layers * (history + candidates) * 2 * layer.projection
    finished = (before * history + config.layers * candidates) * 2 * layer.after + pairs * layer.per_pair(config.heads)
    rest = candidates * (_rest(config, blocks, len(schema.tasks)) + _bits(config, schema, of_items=True))
    total: np.ndarray = blocks * (projected + finished) + rest + _bits(config, schema, of_items=False)
    return total


def _history_pairs[N: (int, np.ndarray)](config: ModelConfig, history: N) -> N:
    """Pairs of a history row and a history row that it sees."""
    seen: N = history * (history + 1) // 2 if config.architecture == "hstu" else history * history
    return seen


def _slot_words(config: ModelConfig, schema: FeatureSchema, history: int, candidates: int) -> int:
    """4-byte words of the request's row, its tokens (item, action, time) and its features."""
    blocks = len(schema.blocks)
    per_candidate = sum(group == "item" for group, _ in schema.slot_features)
    per_request = row_width(blocks) + len(schema.slot_features) - per_candidate
    tokens = blocks * (history + candidates) * (3 + config.host_words)
    return per_request + tokens + candidates * per_candidate


class _Layer(NamedTuple):
    """Weights that every row meets and those that computed rows meet besides; a head's query and value sizes."""

    projection: int
    after: int
    query: int
    value: int

    @property
    def weights(self) -> int:
        return self.projection + self.after

    def per_pair(self, heads: int) -> int:
        """FLOPs of one query row and one key."""
        return 2 * heads * (self.query + self.value)


def _layer(config: ModelConfig) -> _Layer:
    d, heads = config.width, config.heads
    if config.architecture == "hstu":
        query, value = config.head_dim, config.hstu.value_dim
        outputs = heads * value * (3 if config.hstu.variant == "dlrm_v3" else 1)
        return _Layer(d * 2 * heads * (query + value), outputs * d, query, value)
    inner = heads * config.head_dim
    return _Layer(3 * d * inner, inner * d + 2 * d * config.ffn, config.head_dim, config.head_dim)


def _bits(config: ModelConfig, schema: FeatureSchema, *, of_items: bool) -> int:
    """FLOPs of embedding one item's, or one request's, multi-hot features: the only ones that are products."""
    sizes = [f.size for group, f in schema.features if f.kind == "bits" and (group == "item") == of_items]
    return 2 * config.width * sum(sizes)


def _rest(config: ModelConfig, blocks: int, tasks: int) -> int:
    """FLOPs per candidate of fusion and head."""
    outputs, flops = config.width, 0
    if config.architecture == "climber":
        outputs = blocks * config.width
        if config.climber.fusion:
            layer = _layer(config)
            squeezed = max(1, outputs // config.climber.gate_reduction)
            flops += blocks * 2 * layer.weights + blocks * blocks * layer.per_pair(config.heads)
            flops += 4 * outputs * squeezed
    head = config.head
    flops += 2 * head.experts * outputs * head.expert_hidden
    if head.experts > 1:  # one alone is not mixed
        flops += 2 * tasks * (outputs * head.experts + head.experts * head.expert_hidden)
    return flops + 2 * tasks * (head.expert_hidden * head.tower_hidden + head.tower_hidden)
