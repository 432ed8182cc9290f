"""What the model reads: the feature schema, from which slot layout, store records and manifest derive."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

Source = Literal["", "store", "request", "table"]

MAX_BITS = 31
"""Widest multi-hot feature: it travels as one int32 word."""


NO_KEY = -1
"""Key of an `id` feature without a value; like every unknown key it reads row 0."""


@dataclass(frozen=True)
class Feature:
    """One side feature of an item, a user or the request's context.

    Attributes:
        name: unique within its group.
        kind: `categorical` is an int32 in [0, size); `bits` is a multi-hot int32 of `size` bits; `numeric` is a
            float32; `id` is an external int64 key, mapped to a row by a vocabulary that training makes.
        size: number of values (categorical), of bits (bits, at most 31), or of keys that the vocabulary holds at
            most, the most frequent ones (id; row 0 is added for all others); 0 for numeric.
        source: where an item's value comes from: `store`, read for each request; `request`, sent with each
            candidate; `table`, a column on the device by item row, filled from the store when the model is
            trained, so that only the item id crosses the bus. In a schema "" becomes the group's own: the store for
            items and users, the request for the context.
    """

    name: str
    kind: Literal["categorical", "numeric", "bits", "id"]
    size: int = 0
    source: Source = ""

    def __post_init__(self) -> None:
        if self.kind not in ("categorical", "numeric", "bits", "id"):
            raise ValueError(f"feature {self.name!r} has kind {self.kind!r}, not categorical, numeric, bits or id")
        if self.source not in ("", "store", "request", "table"):
            raise ValueError(f"feature {self.name!r} has source {self.source!r}, not store, request or table")
        if not self.name.isidentifier():
            raise ValueError(f"feature name {self.name!r} is not an identifier")
        if self.kind == "numeric" and self.size != 0:
            raise ValueError(f"feature {self.name!r} is numeric: leave its size at 0, not {self.size}")
        if self.kind == "categorical" and not 0 < self.size <= 2**31 - 1:
            raise ValueError(f"feature {self.name!r} is categorical: size must be positive, not {self.size}")
        if self.kind == "id" and not 0 < self.size <= 2**31 - 2:  # its rows are one more
            raise ValueError(f"feature {self.name!r} is id: size must be positive, not {self.size}")
        if self.kind == "bits" and not 0 < self.size <= MAX_BITS:
            raise ValueError(f"feature {self.name!r} is bits: size must be 1..{MAX_BITS}, not {self.size}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a value as the model reads it: float32 for numeric, int32 otherwise (of an id, its row)."""
        return np.dtype("<f4") if self.kind == "numeric" else np.dtype("<i4")

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Of a value in the store and in a request: int64 for an id's key, else `dtype`."""
        return np.dtype("<i8") if self.kind == "id" else self.dtype

    @property
    def default(self) -> int:
        """What stands for a missing value, in the store and in a request."""
        return NO_KEY if self.kind == "id" else 0

    @property
    def limit(self) -> int:
        """Values as the model reads them lie in [0, limit); meaningless for numeric."""
        if self.kind == "bits":
            return 1 << self.size  # of few bits: of another kind's size it would be a number of megabytes
        return self.size + 1 if self.kind == "id" else self.size

    @property
    def rows(self) -> int:
        """Rows of its embedding table."""
        return {"numeric": 1, "id": self.size + 1}.get(self.kind, self.size)

    def fits(self, values: np.ndarray) -> bool:
        """Whether every one of `stored_dtype` values is in range."""
        if self.kind == "numeric":
            return bool(np.isfinite(values).all())
        if self.kind == "id":
            return bool((values >= NO_KEY).all())
        return bool(((values >= 0) & (values < self.limit)).all())


@dataclass(frozen=True)
class Block:
    """One sub-sequence of the history (multi-scale sequence extraction, Climber section 3).

    Attributes:
        name: the strategy's name.
        actions: action ids that belong to it; empty means every action.
    """

    name: str
    actions: tuple[int, ...] = ()


@dataclass(frozen=True)
class FeatureSchema:
    """Everything a model reads about a request, and what it answers.

    Attributes:
        tasks: one score per candidate and task, in this order.
        scenarios: names a request may carry; the first is the default.
        actions: number of action types; a history event's action id lies in [0, actions).
        blocks: sub-sequences extracted from the history, each with a stack of layers of its own.
        block_length: events per block at most; the newest are kept.
        interleave: an event takes two rows of the history, its item and then its action (NVIDIA's HSTU).
        item_features: candidate-side features; each names its source.
        user_features: read from the store with the user's history.
        context_features: sent with the request; what a request says of its user belongs here.
    """

    tasks: tuple[str, ...] = ("score",)
    scenarios: tuple[str, ...] = ("default",)
    actions: int = 1
    blocks: tuple[Block, ...] = (Block("all"),)
    block_length: int = 128
    interleave: bool = False
    item_features: tuple[Feature, ...] = ()
    user_features: tuple[Feature, ...] = ()
    context_features: tuple[Feature, ...] = ()

    def __post_init__(self) -> None:
        _unique("tasks", self.tasks)
        _unique("scenarios", self.scenarios)
        _unique("blocks", [b.name for b in self.blocks])
        for group in ("item_features", "user_features", "context_features"):
            names = [f.name for f in getattr(self, group)]
            if names:
                _unique(group, names)
        own: Source
        for group, own in (("item_features", "store"), ("user_features", "store"), ("context_features", "request")):
            named = tuple(f if f.source else replace(f, source=own) for f in getattr(self, group))
            object.__setattr__(self, group, named)
            if wrong := [f.name for f in named if f.source != own and group != "item_features"]:
                raise ValueError(f"schema.{group}: {wrong[0]!r} can only come from the {own}")
        if any(f.name == "id" for f in self.item_features):
            raise ValueError("schema.item_features may not name a feature 'id': it is the stored row's key")
        if type(self.actions) is not int or type(self.block_length) is not int:
            raise ValueError("schema.actions and schema.block_length must be integers")
        if self.actions < 1:
            raise ValueError(f"schema.actions must be at least 1, not {self.actions}")
        if self.block_length < 1:
            raise ValueError(f"schema.block_length must be at least 1, not {self.block_length}")
        for block in self.blocks:
            bad = [a for a in block.actions if not 0 <= a < self.actions]
            if bad:
                raise ValueError(f"block {block.name!r} names actions {bad} outside [0, {self.actions})")

    @property
    def history_rows(self) -> int:
        """Rows of the longest history: the window that attention reads."""
        return self.block_length * (2 if self.interleave else 1)

    @property
    def stored_item_features(self) -> tuple[Feature, ...]:
        """Those that an item's record in the store holds."""
        return tuple(f for f in self.item_features if f.source != "request")

    @property
    def slot_features(self) -> tuple[tuple[str, Feature], ...]:
        """Every side feature that travels to the device with a request, with its group, in slot order."""
        return tuple((group, f) for group, f in self.features if f.source != "table")

    @property
    def features(self) -> tuple[tuple[str, Feature], ...]:
        """Every side feature with its group: items', users', the context's."""
        groups = (("item", self.item_features), ("user", self.user_features), ("context", self.context_features))
        return tuple((group, feature) for group, features in groups for feature in features)

    @property
    def id_features(self) -> dict[str, Feature]:
        """Every id feature by its full name (`feature_field`): those that have a vocabulary."""
        return {feature_field(group, f): f for group, f in self.features if f.kind == "id"}

    @property
    def fetches_items(self) -> bool:
        """Whether scoring needs the candidates' records from the store."""
        return any(f.source == "store" for f in self.item_features)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts, as `json` reads them back."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FeatureSchema:
        """Inverse of `to_json`. Raises ValueError for an unknown field or a bad value."""
        known = {f.name for f in fields(cls)}
        if unknown := set(data) - known:
            raise ValueError(f"feature schema has unknown fields {sorted(unknown)}")
        if not all(isinstance(data.get(name), list) for name in ("tasks", "scenarios", "blocks")):
            raise ValueError("feature schema needs lists of tasks, scenarios and blocks")
        values = dict(data)
        try:
            for group in ("item_features", "user_features", "context_features"):
                values[group] = tuple(Feature(**f) for f in data.get(group, ()))
            values["blocks"] = tuple(Block(**b | {"actions": tuple(b["actions"])}) for b in data["blocks"])
            values["tasks"] = tuple(data["tasks"])
            values["scenarios"] = tuple(data["scenarios"])
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"feature schema is malformed: {error}") from error

    def store_fingerprint(self) -> str:
        """SHA-256 of what the store holds: records of another fingerprint cannot be read."""

        def stored(features: tuple[Feature, ...]) -> list[dict[str, Any]]:
            # How many of an id's keys the model knows is no matter of the store's.
            return [{"name": f.name, "kind": f.kind, "size": 0 if f.kind == "id" else f.size} for f in features]

        return _digest(
            {
                "actions": self.actions,
                "item_features": stored(self.stored_item_features),
                "user_features": stored(self.user_features),
            }
        )


def feature_field(group: str, feature: Feature) -> str:
    """A side feature's full name: of its slot field, its table and its vocabulary."""
    return f"{group}.{feature.name}"


def record_dtype(features: tuple[Feature, ...]) -> np.dtype[Any]:
    """Structured dtype of one packed row of side features as they are stored and sent."""
    return np.dtype([(f.name, f.stored_dtype) for f in features])


def default_rows(features: tuple[Feature, ...], dtype: np.dtype[Any], count: int | tuple[int, ...]) -> np.ndarray:
    """Structured[count] rows of `dtype` in which every feature is missing."""
    rows = np.zeros(count, dtype)
    for feature in features:
        if feature.default:
            rows[feature.name] = feature.default
    return rows


def _unique(what: str, names: list[str] | tuple[str, ...]) -> None:
    if not names or len(set(names)) != len(names) or not all(names):
        raise ValueError(f"schema.{what} must be non-empty, distinct names, not {list(names)}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
