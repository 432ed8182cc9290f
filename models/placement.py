"""Other people's tensors in our model's places: every one is used, named as left out, or an error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
from flax import nnx

from flame_jax.config import ModelConfig
from flame_jax.models.params import misfits
from flame_jax.models.public_layers import Layers
from flame_jax.models.registry import make_ranker
from flame_jax.models.serving import abstract_model, flat_weights, flat_weights_shapes
from flame_jax.schema import FeatureSchema
from flame_jax.vocabulary import UNKNOWN_ROW, Vocabulary

VOCABULARY = "vocabulary"
STACK = "layers/"
ITEM_TABLES = ("item", "item_bias")
"""Weights with one row per item."""

ReadStack = Callable[[Mapping[str, np.ndarray], Collection[str]], Layers]
"""(tensors, weights to leave out, without `layers/`) -> the layers stored under public names."""


@dataclass(frozen=True)
class Choices:
    """What a person says of tensors that our names do not settle.

    Attributes:
        rename: our name, or `vocabulary` -> theirs.
        fresh: patterns of our weights that keep their initial value.
        ignore: patterns of their tensors that are left out, before anything is looked for.
        unknown_row: their item tables begin with an out-of-vocabulary row.
    """

    rename: Mapping[str, str] = field(default_factory=dict)
    fresh: Sequence[str] = ()
    ignore: Sequence[str] = ()
    unknown_row: bool = True


class Placed(NamedTuple):
    """A model's weights, and where they are from.

    Attributes:
        weights: our name -> float32, in the model's order.
        fresh: our names at their initial value.
        ignored: their names left out.
    """

    weights: dict[str, np.ndarray]
    vocabulary: Vocabulary
    fresh: list[str]
    ignored: list[str]


def place(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    schema: FeatureSchema,
    choices: Choices,
    *,
    seed: int,
    ids: np.ndarray | None = None,
    read_stack: ReadStack | None = None,
) -> Placed:
    """Make a model's weights of named tensors.

    Args:
        tensors: theirs; under our names, but for what `choices` and `read_stack` say.
        seed: of the initial values.
        ids: int64[n], external ids in the order of their item tables' rows; None takes the tensor `vocabulary`.
        read_stack: reads `layers/...`; None expects them under our names too.

    Raises:
        ValueError: naming everything that is missing, extra, misshapen, no float or not finite, and every choice that
            has no effect.
    """
    problems: list[str] = []
    ignored = _matched("--ignore", choices.ignore, tensors, "a tensor", problems)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    taken, ids = _ids(tensors, choices, ids)
    vocabulary = Vocabulary(ids)
    shapes = flat_weights_shapes(abstract_model(config, schema, vocabulary.rows))
    fresh = _matched("--fresh", choices.fresh, shapes, "a weight", problems)
    wanted = [name for name in shapes if name not in fresh]

    stack: dict[str, np.ndarray] = {}
    if read_stack is not None:
        stack, names = _read_stack(read_stack, tensors, shapes, fresh, problems)
        taken |= names
        wanted = [name for name in wanted if not name.startswith(STACK)]
    _check_renames(choices, shapes, fresh, STACK if read_stack else None, problems)
    theirs = {name: choices.rename.get(name, name) for name in wanted}
    problems += _used_twice(theirs, taken)
    spare = 0 if choices.unknown_row else 1
    expected = {theirs[n]: (shapes[n][0] - spare, *shapes[n][1:]) if n in ITEM_TABLES else shapes[n] for n in wanted}
    problems += misfits(expected, {name: t for name, t in tensors.items() if name in expected or name not in taken})
    taken |= set(expected)
    problems += _unusable(tensors, [name for name in tensors if name in taken and tensors[name] is not ids])
    if problems:
        raise ValueError("the tensors do not fit the model: " + "; ".join(problems))

    found = {name: tensors[theirs[name]] for name in wanted} | stack
    found |= {name: _by_id(found[name], ids, choices.unknown_row) for name in ITEM_TABLES if name in found}
    if fresh:
        initial = flat_weights(make_ranker(config, schema, vocabulary.rows, rngs=nnx.Rngs(seed)))
        found |= {name: initial[name] for name in fresh}
    return Placed({name: found[name] for name in shapes}, vocabulary, fresh, ignored)


def not_finite(weights: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the weights with a NaN or an infinity."""
    return [name for name, value in weights.items() if not np.isfinite(value).all()]


def _matched(option: str, patterns: Iterable[str], names: Collection[str], what: str, problems: list[str]) -> list[str]:
    """The names that a pattern covers; a pattern that covers none is a typing error."""
    problems += [
        f"{option} {pattern} covers no name of {what}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _ids(tensors: Mapping[str, np.ndarray], choices: Choices, ids: np.ndarray | None) -> tuple[set[str], np.ndarray]:
    """The tensor that the ids are in, if it is one, and the ids."""
    if ids is not None:
        if VOCABULARY in choices.rename:
            raise ValueError("the vocabulary is both given as a file and renamed")
        return set(), ids
    name = choices.rename.get(VOCABULARY, VOCABULARY)
    if name not in tensors:
        raise ValueError(f"no item ids: there is no tensor {name}, and --vocabulary names no file")
    if tensors[name].dtype != np.int64:
        raise ValueError(f"{name} is {tensors[name].dtype}, item ids are int64")
    return {name}, tensors[name]


def _read_stack(
    read: ReadStack,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    fresh: Collection[str],
    problems: list[str],
) -> tuple[dict[str, np.ndarray], set[str]]:
    """`layers/...` of a public stack, and the names it has tensors under."""
    ours = {name: shape for name, shape in shapes.items() if name.startswith(STACK)}
    layers = read(tensors, {name.removeprefix(STACK) for name in ours if name in fresh})
    problems += layers.problems
    depth = next(iter(ours.values()))[0]
    if layers.depth and layers.depth != depth:
        problems.append(f"{layers.depth} layers, and model.layers is {depth}")
    return {STACK + name: weight for name, weight in layers.weights.items()}, layers.names


def _check_renames(
    choices: Choices,
    shapes: Collection[str],
    fresh: Collection[str],
    public: str | None,
    problems: list[str],
) -> None:
    """A renaming must have an effect."""
    for ours in choices.rename:
        if ours in fresh:
            problems.append(f"{ours} is both renamed and fresh")
        elif public is not None and ours.startswith(public):
            problems.append(f"--rename {ours}: layers come from their public names")
        elif ours not in shapes and ours != VOCABULARY:
            problems.append(f"--rename {ours}: the model has no such weight")


def _used_twice(theirs: Mapping[str, str], taken: Collection[str]) -> list[str]:
    """Tensors that two places ask for; `taken` is what stack and vocabulary have."""
    places = list(theirs.values())
    return [
        f"{name} is used twice, for {ours} and elsewhere"
        for ours, name in theirs.items()
        if name in taken or places.count(name) > 1
    ]


def _unusable(tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """Of the tensors that become weights: those of integers, and those with a NaN or an infinity."""
    whole = [name for name in names if tensors[name].dtype.kind != "f"]
    bad = not_finite({name: tensors[name] for name in names if name not in whole})
    return [f"{name} is {tensors[name].dtype}, expected float32" for name in whole] + [
        f"{name} is not finite everywhere" for name in bad
    ]


def _by_id(table: np.ndarray, ids: np.ndarray, unknown_row: bool) -> np.ndarray:
    """Rows in the order of their ids to a vocabulary's: the out-of-vocabulary row, then ascending ids."""
    rows = table[UNKNOWN_ROW + 1 :] if unknown_row else table
    unknown = table[: UNKNOWN_ROW + 1] if unknown_row else np.zeros_like(table[:1])
    return np.concatenate([unknown, rows[np.argsort(ids)]])
