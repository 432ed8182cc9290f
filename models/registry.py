"""Architectures by their name in the configuration."""

from __future__ import annotations

from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.climber import Climber
from flame_jax.models.hstu import Hstu
from flame_jax.models.ranker import Ranker
from flame_jax.models.transformer import Transformer
from flame_jax.schema import FeatureSchema

ARCHITECTURES: dict[str, type[Ranker]] = {"climber": Climber, "hstu": Hstu, "transformer": Transformer}


def make_ranker(config: ModelConfig, schema: FeatureSchema, vocabulary: int, *, rngs: nnx.Rngs) -> Ranker:
    """A ranker with initial weights.

    Args:
        vocabulary: item rows, the out-of-vocabulary row 0 included.

    Raises:
        ValueError: the architecture can't read the schema.
    """
    make = ARCHITECTURES[config.architecture]
    return make(config, schema, vocabulary, rngs=rngs)  # type: ignore[call-arg]
