"""What rankers of one block share: learned positions at the input and a norm at the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.embeddings import EMBEDDING_SCALE
from flame_jax.models.params import constant, normal
from flame_jax.models.positions import once_per_token, reversed_positions
from flame_jax.models.ranker import Packed, Ranker
from flame_jax.pallas_kernels.rows import layer_norm
from flame_jax.schema import FeatureSchema


class OneBlockRanker(Ranker):
    """A ranker that reads one sequence.

    Raises:
        ValueError: the schema has more than one block.
    """

    def __init__(self, config: ModelConfig, schema: FeatureSchema, vocabulary: int, *, rngs: nnx.Rngs) -> None:
        if len(schema.blocks) != 1:
            raise ValueError(f"a {config.architecture} reads one block, the schema has {len(schema.blocks)}")
        super().__init__(config, schema, vocabulary, config.width, rngs=rngs)
        if config.position_rows:
            self.position = normal(rngs, (config.position_rows, config.width), EMBEDDING_SCALE)
        self.final_scale, self.final_shift = constant((config.width,), 1.0), constant((config.width,), 0.0)

    def add_positions(self, x: jax.Array, packed: Packed) -> jax.Array:
        """Add the position table's rows, counted from the newest event, when there is a table."""
        if not self.config.position_rows:
            return x
        rows = once_per_token(jnp.minimum(reversed_positions(packed), self.config.position_rows - 1))
        return x + self.position[...].astype(x.dtype)[rows]

    def finish(self, x: jax.Array, packed: Packed) -> jax.Array:
        """Norm of the candidate rows: [1, n, d] -> [C, d]."""
        return layer_norm(x[0, -packed.candidates :], self.final_scale[...], self.final_shift[...])
