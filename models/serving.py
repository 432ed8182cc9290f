"""A model as a pure function of a flat list of weights and one slot: what is compiled and served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.params import WEIGHTS, misfits
from flame_jax.models.ranker import Ranker
from flame_jax.models.registry import make_ranker
from flame_jax.packing import Bucket, Layout, SlotLayout, slot_layout
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.schema import FeatureSchema

HOT = "hot"
"""Name among the weights, and in a slot, of an item table's rows that the device holds (`model.hot_rows`)."""

RankFunction = Callable[[Sequence[jax.Array], jax.Array], jax.Array]


def flat_weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """Name -> host array, in the order of the flat list."""
    return {name: np.asarray(leaf[...]) for name, leaf in _named(model)}


def weight_specs(model: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype, in the order of the flat list."""
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _named(model)}


def _named(model: nnx.Module) -> list[tuple[str, Any]]:
    return [(_name(path), leaf) for path, leaf in nnx.to_flat_state(nnx.state(model, WEIGHTS))]


def _name(path: Iterable[Any]) -> str:
    return "/".join(map(str, path))


def abstract_model(config: ModelConfig, schema: FeatureSchema, vocabulary: int) -> Ranker:
    """The model as it is trained, with shapes in place of weights."""
    return nnx.eval_shape(lambda: make_ranker(config, schema, vocabulary, rngs=nnx.Rngs(0)))


def served_model(config: ModelConfig, schema: FeatureSchema, vocabulary: int) -> Ranker:
    """The model as it is served, with shapes in place of weights: without an item table that stays in host memory."""
    model = abstract_model(config, schema, vocabulary)
    if config.item_table == "host":
        model.item = None
    return model


def served_slot(config: ModelConfig, schema: FeatureSchema, layout: Layout, bucket: Bucket) -> SlotLayout:
    """The slot that the served model reads."""
    return slot_layout(schema, layout, bucket, host_words=config.host_words, hot=config.hot_rows > 0)


def served_specs(config: ModelConfig, schema: FeatureSchema, vocabulary: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of what lies on the device.

    Tables of items and features are in `model.table_dtype`; matrices, and tables of positions and times, in
    `model.dtype`. `HOT` is the last.
    """
    specs = weight_specs(served_model(config, schema, vocabulary))
    served = {name: jax.ShapeDtypeStruct(s.shape, _served_dtype(config, name, s.dtype)) for name, s in specs.items()}
    if config.hot_rows:
        served[HOT] = jax.ShapeDtypeStruct((hot_rows(config, vocabulary), config.width), jnp.dtype(config.table_dtype))
    return served


def served_weights(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Trained weights as they are served, see `served_specs`."""
    served = {name: np.asarray(w).astype(_served_dtype(config, name, w.dtype)) for name, w in weights.items()}
    if config.item_table == "host":
        table = served.pop("item")
        if config.hot_rows:
            served[HOT] = table[: hot_rows(config, len(table))]
    return served


def hot_rows(config: ModelConfig, vocabulary: int) -> int:
    """Rows of an item table in host memory that the device holds; at first they are the table's first."""
    return min(config.hot_rows, vocabulary)


def host_item_table(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """int32[rows, words] of a trained item table that is served from host memory, else None."""
    if config.item_table == "device":
        return None
    table = np.ascontiguousarray(weights["item"].astype(jnp.dtype(config.table_dtype)))
    return table.view(np.int32)


def _served_dtype(config: ModelConfig, name: str, dtype: Any) -> Any:
    if name == "item" or name.startswith("features/"):
        return jnp.dtype(config.table_dtype)
    # Used in the model's dtype: there they need not be converted for every batch. Logits are float32.
    used = name in ("position", "time") or (name.endswith("_w") and name != "head/logit_w")
    return jnp.dtype(config.dtype) if used else dtype


def check_weights(expected: Mapping[str, jax.ShapeDtypeStruct], weights: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes with `weight_specs` or `served_specs`.

    Raises:
        ValueError: naming every missing, extra and misshapen weight.
    """
    problems = misfits({name: tuple(spec.shape) for name, spec in expected.items()}, weights)
    problems += [
        f"{name} is {weights[name].dtype}, expected {spec.dtype}"
        for name, spec in expected.items()
        if name in weights and weights[name].dtype != spec.dtype
    ]
    if problems:
        raise ValueError("weights do not fit the model: " + "; ".join(problems))


def load_weights(model: nnx.Module, weights: Mapping[str, Any]) -> None:
    """Put weights into a model. Raises ValueError, and changes nothing, when they do not fit."""
    check_weights(weight_specs(model), weights)
    flat = nnx.to_flat_state(nnx.state(model, WEIGHTS))
    loaded = [(path, leaf.replace(jnp.asarray(weights[_name(path)]))) for path, leaf in flat]
    nnx.update(model, nnx.from_flat_state(loaded))


def unpack(slot: jax.Array, layout: SlotLayout) -> dict[str, jax.Array]:
    """Split a slot int32[words] into its fields, inside the program."""
    fields = {}
    for field in layout.fields:
        words = jax.lax.slice(slot, (field.offset,), (field.offset + field.words,))
        if field.dtype == np.float32:
            words = jax.lax.bitcast_convert_type(words, jnp.float32)
        fields[field.name] = words.reshape(field.shape)
    return fields


def rank_function(
    config: ModelConfig,
    schema: FeatureSchema,
    layout: Layout,
    slot: SlotLayout,
    vocabulary: int,
    kernels: Kernels = REFERENCE,
) -> RankFunction:
    """`rank(weights, slot int32[words]) -> float32[C_max, tasks]`, the probability of every candidate row."""
    graph, state = nnx.split(served_model(config, schema, vocabulary), WEIGHTS)
    flat = nnx.to_flat_state(state)

    def rank(weights: Sequence[jax.Array], words: jax.Array) -> jax.Array:
        own, hot = (weights[:-1], weights[-1]) if config.hot_rows else (weights, None)
        leaves = [(path, leaf.replace(w)) for (path, leaf), w in zip(flat, own, strict=True)]
        model = nnx.merge(graph, nnx.from_flat_state(leaves))
        fields = unpack(words, slot)
        if hot is not None:
            fields["hot_rows"] = hot
        logits = model(fields, layout=layout, candidates=slot.bucket.candidates, kernels=kernels)
        return jax.nn.sigmoid(logits)

    return rank
