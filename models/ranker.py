"""The frame that every ranker fills in: tokens in, one logit per candidate and task out."""

from __future__ import annotations

import abc
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.embeddings import EMBEDDING_SCALE, candidate_items, embed_tokens, feature_tables, value_columns
from flame_jax.models.heads import expert_head, head_weights
from flame_jax.models.layers import Attention
from flame_jax.models.params import Param, constant, normal
from flame_jax.packing import Layout
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.pallas_kernels.rows import Drop, keep
from flame_jax.pallas_kernels.segments import Tiles, per_row, tiles
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import Activation, Bias
from flame_jax.schema import FeatureSchema


class Packed(NamedTuple):
    """One packed batch on its way through a model.

    Attributes:
        rows: int32[R, 5 + blocks], request rows.
        time: int32[blocks, T].
        tail: tiles of the candidate rows, the last `candidates` of the token axis.
        candidates: candidate rows of the bucket (C_max).
        align: the layout's alignment.
        window: rows of the longest history.
        tiles_at_once: see `sumi_attention`.
        kernels: implementation of each operation.
    """

    rows: jax.Array
    time: jax.Array
    tail: Tiles
    candidates: int
    align: int
    window: int
    tiles_at_once: int
    kernels: Kernels

    @property
    def first_candidate(self) -> int:
        """First candidate row of the bucket."""
        return int(self.time.shape[1]) - self.candidates

    def attention(self, activation: Activation, *, bias: Bias | None = None, causal: bool = False) -> Attention:
        """`sumi_attention` of this batch, as layers take it."""
        return partial(
            sumi_attention,
            rows=self.rows,
            time=self.time,
            activation=activation,
            bias=bias,
            causal=causal,
            align=self.align,
            window=self.window,
            tiles_at_once=self.tiles_at_once,
            implementation=self.kernels.sumi_attention,
        )

    def per_candidate(self, per_tile: jax.Array) -> jax.Array:
        """[tiles, ...] -> [C_max, ...]."""
        return per_row(per_tile, self.align)


class Ranker(nnx.Module, abc.ABC):
    """Embeddings, item bias and head; `represent` is the model proper.

    Args:
        vocabulary: item rows, the out-of-vocabulary row 0 included.
        outputs: numbers that `represent` gives per candidate.
    """

    def __init__(
        self, config: ModelConfig, schema: FeatureSchema, vocabulary: int, outputs: int, *, rngs: nnx.Rngs
    ) -> None:
        self.config, self.schema = config, schema
        self.item: Param | None = normal(rngs, (vocabulary, config.width), EMBEDDING_SCALE)
        self.action = normal(rngs, (schema.actions + 1, config.width), EMBEDDING_SCALE)
        self.item_bias = constant((vocabulary, len(schema.tasks)), 0.0)
        self.features = feature_tables(rngs, schema, config.width)
        self.columns = value_columns(schema, vocabulary)
        self.head = head_weights(rngs, config.head, outputs, len(schema.tasks))

    @abc.abstractmethod
    def represent(self, x: jax.Array, packed: Packed, drop: Drop) -> jax.Array:
        """Token embeddings [blocks, T, d] -> [C_max, outputs]."""

    def __call__(
        self,
        fields: dict[str, jax.Array],
        *,
        layout: Layout,
        candidates: int,
        drop: Drop = keep,
        tiles_at_once: int = 1,
        kernels: Kernels = REFERENCE,
    ) -> jax.Array:
        """Logits of the candidate rows of a packed batch.

        Args:
            fields: the fields of a slot, see `flame_jax.packing.slot_layout`.
            candidates: candidate rows of the bucket (C_max), the last rows of the token axis.
            drop: dropout, when training.
            tiles_at_once: see `sumi_attention`.
            kernels: implementation of each operation.

        Returns:
            float32[candidates, tasks]; rows without a candidate are finite and mean nothing.
        """
        tokens = fields["item"].shape[1]
        tail = tiles(fields["rows"], align=layout.align, first=tokens - candidates, last=tokens)
        window = min(layout.aligned(self.schema.history_rows), tokens)
        packed = Packed(fields["rows"], fields["time"], tail, candidates, layout.align, window, tiles_at_once, kernels)
        x = embed_tokens(self.item, self.action, self.features, self.columns, self.schema, fields, tail, layout.align)
        y = self.represent(drop(x.astype(jnp.dtype(self.config.dtype))), packed, drop)
        logits = expert_head({name: leaf[...] for name, leaf in self.head.items()}, y)
        return logits + self.item_bias[...][candidate_items(fields, candidates)]
