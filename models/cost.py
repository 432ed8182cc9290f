"""What a request costs: useful floating-point operations (what the mask lets through, a multiply-add counted as two)
and bytes."""

from __future__ import annotations

from typing import NamedTuple

from flame_jax.config import ModelConfig
from flame_jax.packing import row_width
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
    weights, query, value = _layer_shape(config)
    causal = config.architecture == "hstu"
    pairs = (history * (history + 1) // 2 if causal else history * history) + candidates * (history + 1)
    per_pair = 2 * config.heads * (query + value)
    stack = config.layers * blocks
    return Cost(
        linear=stack * rows * 2 * weights,
        attention=stack * pairs * per_pair,
        masked=stack * (rows * rows - pairs) * per_pair,
        rest=candidates * _rest(config, blocks, len(schema.tasks)),
        slot_bytes=4 * _slot_words(config, schema, history, candidates),
        history_bytes=stack * history * config.heads * (query + value) * (2 if config.dtype == "bfloat16" else 4),
        score_bytes=4 * candidates * len(schema.tasks),
    )


def _slot_words(config: ModelConfig, schema: FeatureSchema, history: int, candidates: int) -> int:
    """4-byte words of the request's row, its tokens (item, action, time) and its features."""
    blocks = len(schema.blocks)
    per_candidate = sum(group == "item" for group, _ in schema.slot_features)
    per_request = row_width(blocks) + len(schema.slot_features) - per_candidate
    tokens = blocks * (history + candidates) * (3 + config.host_words)
    return per_request + tokens + candidates * per_candidate


def _layer_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Weights in a layer's matrices, and a head's query and value sizes."""
    d, heads = config.width, config.heads
    if config.architecture == "hstu":
        query, value = config.head_dim, config.hstu.value_dim
        outputs = heads * value * (3 if config.hstu.variant == "dlrm_v3" else 1)
        return d * 2 * heads * (query + value) + outputs * d, query, value
    inner = heads * config.head_dim
    return 4 * d * inner + 2 * d * config.ffn, config.head_dim, config.head_dim


def _rest(config: ModelConfig, blocks: int, tasks: int) -> int:
    """FLOPs per candidate of fusion and head."""
    outputs, flops = config.width, 0
    if config.architecture == "climber":
        outputs = blocks * config.width
        if config.climber.fusion:
            weights, query, value = _layer_shape(config)
            squeezed = max(1, outputs // config.climber.gate_reduction)
            flops += blocks * 2 * weights + blocks * blocks * 2 * config.heads * (query + value)
            flops += 4 * outputs * squeezed
    head = config.head
    flops += 2 * head.experts * outputs * head.expert_hidden
    flops += 2 * tasks * (outputs * head.experts + head.experts * head.expert_hidden)
    return flops + 2 * tasks * (head.expert_hidden * head.tower_hidden + head.tower_hidden)
