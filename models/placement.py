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
from flame_jax.models.serving import abstract_model, flat_weights, weight_specs
from flame_jax.schema import FeatureSchema, feature_field
from flame_jax.vocabulary import UNKNOWN_ROW, Vocabularies, Vocabulary

VOCABULARY = "vocabulary"
STACK = "layers/"
COLUMNS = "columns/"
ITEMS = ""
"""Stands for the items where an id feature's name is asked for."""

ReadStack = Callable[[Mapping[str, np.ndarray], Collection[str]], Layers]
"""(tensors, weights to leave out, without `layers/`) -> the layers stored under public names."""


@dataclass(frozen=True)
class Choices:
    """What a person says of tensors that our names do not settle.

    Attributes:
        rename: our name, or a vocabulary's -> theirs.
        fresh: patterns of our weights that keep their initial value.
        ignore: patterns of their tensors that are left out, before anything is looked for.
        unknown_row: their tables of ids begin with an out-of-vocabulary row.
    """

    rename: Mapping[str, str] = field(default_factory=dict)
    fresh: Sequence[str] = ()
    ignore: Sequence[str] = ()
    unknown_row: bool = True


class Placed(NamedTuple):
    """A model's weights, and where they are from.

    Attributes:
        weights: our name -> array, in the model's order.
        fresh: our names at their initial value.
        ignored: their names left out.
    """

    weights: dict[str, np.ndarray]
    vocabularies: Vocabularies
    fresh: list[str]
    ignored: list[str]


def place(
    tensors: Mapping[str, np.ndarray],
    config: ModelConfig,
    schema: FeatureSchema,
    choices: Choices,
    *,
    seed: int,
    ids: Mapping[str, np.ndarray] | None = None,
    read_stack: ReadStack | None = None,
) -> Placed:
    """Make a model's weights of named tensors.

    Args:
        tensors: theirs; under our names, but for what `choices` and `read_stack` say.
        seed: of the initial values.
        ids: int64[n] external ids in the order of their tables' rows, by id feature (`item.brand`) and of the items
            under ITEMS; one that is not given is the tensor `vocabulary/item.brand`, or `vocabulary`.
        read_stack: reads `layers/...`; None expects them under our names too.

    Raises:
        ValueError: naming everything that is missing, extra, misshapen, of another kind or not finite, and every
            choice that has no effect.
    """
    problems: list[str] = []
    ignored = _matched("--ignore", choices.ignore, tensors, "a tensor", problems)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    id_tensors, row_ids = _all_ids(tensors, schema, choices, ids or {})
    taken = set(id_tensors)
    vocabularies = _vocabularies(row_ids, schema)
    specs = weight_specs(abstract_model(config, schema, vocabularies.items.rows))
    shapes = {name: tuple(spec.shape) for name, spec in specs.items()}
    fresh = _matched("--fresh", choices.fresh, shapes, "a weight", problems)
    wanted = [name for name in shapes if name not in fresh]

    stack: dict[str, np.ndarray] = {}
    if read_stack is not None:
        stack, names = _read_stack(read_stack, tensors, shapes, fresh, problems)
        taken |= names
        wanted = [name for name in wanted if not name.startswith(STACK)]
    _check_renames(choices, {*shapes, *map(_vocabulary_name, row_ids)}, fresh, STACK if read_stack else None, problems)
    theirs = {name: choices.rename.get(name, name) for name in wanted}
    problems += _used_twice(theirs, taken)
    spare = 0 if choices.unknown_row else 1
    by_id = {name: row_ids[feature] for name in wanted if (feature := _whose_ids(name, schema)) is not None}
    expected = {theirs[n]: (shapes[n][0] - spare, *shapes[n][1:]) if n in by_id else shapes[n] for n in wanted}
    problems += misfits(expected, {name: t for name, t in tensors.items() if name in expected or name not in taken})
    taken |= set(expected)
    kinds = {theirs[name]: specs[name].dtype.kind for name in wanted}
    problems += _unusable(tensors, {n: kinds.get(n, "f") for n in tensors if n in taken and n not in id_tensors})
    problems += _outside(tensors, theirs, schema, row_ids, choices.unknown_row)
    if problems:
        hint = "--rename, --fresh and --ignore settle names"
        raise ValueError(f"the tensors do not fit the model ({hint}): " + "; ".join(problems))

    found = {name: tensors[theirs[name]].astype(specs[name].dtype, copy=False) for name in wanted} | stack
    found |= {name: _by_id(found[name], ids_of, choices.unknown_row) for name, ids_of in by_id.items()}
    for name, keys in _id_columns(wanted, row_ids).items():
        found[name] = _renumbered(found[name], keys, choices.unknown_row)
    if fresh:
        initial = flat_weights(make_ranker(config, schema, vocabularies.items.rows, rngs=nnx.Rngs(seed)))
        found |= {name: initial[name] for name in fresh}
    return Placed({name: found[name] for name in shapes}, vocabularies, fresh, ignored)


def not_finite(weights: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the weights with a NaN or an infinity."""
    return [name for name, value in weights.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]


def _matched(option: str, patterns: Iterable[str], names: Collection[str], what: str, problems: list[str]) -> list[str]:
    """The names that a pattern covers; a pattern that covers none is a typing error."""
    problems += [
        f"{option} {pattern} covers no name of {what}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _vocabulary_name(feature: str) -> str:
    return f"{VOCABULARY}/{feature}" if feature else VOCABULARY


def _all_ids(
    tensors: Mapping[str, np.ndarray], schema: FeatureSchema, choices: Choices, given: Mapping[str, np.ndarray]
) -> tuple[set[str], dict[str, np.ndarray]]:
    """The tensors that ids are in, and the ids of the items and of every id feature."""
    features = [ITEMS, *schema.id_features]
    if strange := set(given) - set(features):
        raise ValueError(f"--vocabulary for {', '.join(sorted(strange))}: the schema has no such id feature")
    taken, ids = set(), {}
    for feature in features:
        ours = _vocabulary_name(feature)
        if feature in given:
            if ours in choices.rename:
                raise ValueError(f"{ours} is both given as a file and renamed")
            ids[feature] = given[feature]
            continue
        theirs = choices.rename.get(ours, ours)
        if theirs not in tensors:
            what = f"ids of {feature}" if feature else "item ids"
            raise ValueError(f"no {what}: there is no tensor {theirs}, and --vocabulary names no file")
        if tensors[theirs].dtype != np.int64:
            raise ValueError(f"{theirs} is {tensors[theirs].dtype}, ids are int64")
        taken.add(theirs)
        ids[feature] = tensors[theirs]
    return taken, ids


def _vocabularies(ids: Mapping[str, np.ndarray], schema: FeatureSchema) -> Vocabularies:
    features = {feature: Vocabulary(of) for feature, of in ids.items() if feature != ITEMS}
    vocabularies = Vocabularies(Vocabulary(ids[ITEMS]), features)
    vocabularies.check(schema)
    return vocabularies


def _whose_ids(weight: str, schema: FeatureSchema) -> str | None:
    """The id feature, or ITEMS, whose ids number a weight's rows; None for a weight whose rows are no ids."""
    group, _, name = weight.partition("/")
    if group in ("item", "item_bias", "columns"):
        return ITEMS
    return name if group == "features" and name in schema.id_features else None


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
    known: Collection[str],
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
        elif ours not in known:
            problems.append(f"--rename {ours}: the model has no such weight")


def _used_twice(theirs: Mapping[str, str], taken: Collection[str]) -> list[str]:
    """Tensors that two places ask for; `taken` is what stack and vocabulary have."""
    places = list(theirs.values())
    return [
        f"{name} is used twice, for {ours} and elsewhere"
        for ours, name in theirs.items()
        if name in taken or places.count(name) > 1
    ]


def _unusable(tensors: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> list[str]:
    """Of the tensors that become weights: those of another kind (float or integer), and those that are not finite."""
    wrong = [name for name, kind in kinds.items() if (tensors[name].dtype.kind == "f") != (kind == "f")]
    wide = [n for n, kind in kinds.items() if kind == "i" and n not in wrong and not _fits_int32(tensors[n])]
    bad = not_finite({name: tensors[name] for name in kinds if name not in wrong})
    words = {"f": "float32", "i": "int32"}
    problems = [f"{name} is {tensors[name].dtype}, expected {words[kinds[name]]}" for name in wrong]
    problems += [f"{name} has values that do not fit int32" for name in wide]
    return problems + [f"{name} is not finite everywhere" for name in bad]


def _fits_int32(values: np.ndarray) -> bool:
    return bool((values >= -(2**31)).all() and (values < 2**31).all())


def _id_columns(names: Collection[str], ids: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those weights that hold, by item, rows of an id feature's table; and the feature's keys."""
    return {n: ids[feature] for n in names if n.startswith(COLUMNS) and (feature := n.removeprefix(COLUMNS)) in ids}


def _outside(
    tensors: Mapping[str, np.ndarray],
    theirs: Mapping[str, str],
    schema: FeatureSchema,
    ids: Mapping[str, np.ndarray],
    unknown_row: bool,
) -> list[str]:
    """Columns with a value that is no row of its feature's table, or out of its feature's range."""
    problems = []
    for feature in schema.item_features:
        name = theirs.get(COLUMNS + feature_field("item", feature), "")
        column = tensors.get(name)
        if feature.kind == "numeric" or column is None or column.dtype.kind not in "iu":
            continue
        limit = feature.limit
        if feature.kind == "id":
            limit = len(ids[feature_field("item", feature)]) + (1 if unknown_row else 0)
        if ((column < 0) | (column >= limit)).any():
            problems.append(f"{name} has values outside [0, {limit})")
    return problems


def _renumbered(column: np.ndarray, keys: np.ndarray, unknown_row: bool) -> np.ndarray:
    """Their rows of an id feature's table as ours, whose keys ascend."""
    rows = np.empty(len(keys) + 1, column.dtype)
    rows[0] = UNKNOWN_ROW
    rows[1 + np.argsort(keys)] = np.arange(1, len(keys) + 1)
    if unknown_row:
        renumbered: np.ndarray = rows[column]
        return renumbered
    # Theirs begin at the first key; the row that was added for unknown items has no value.
    return np.concatenate([[UNKNOWN_ROW], rows[column[1:] + 1]]).astype(column.dtype)


def _by_id(table: np.ndarray, ids: np.ndarray, unknown_row: bool) -> np.ndarray:
    """Rows in the order of their ids to a vocabulary's: the out-of-vocabulary row, ascending ids, rows to spare."""
    rows = table[UNKNOWN_ROW + 1 :] if unknown_row else table
    unknown = table[: UNKNOWN_ROW + 1] if unknown_row else np.zeros_like(table[:1])
    return np.concatenate([unknown, rows[np.argsort(ids)], rows[len(ids) :]])
