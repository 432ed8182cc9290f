"""What the model reads: the feature schema, from which slot layout, store records and manifest derive."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

MAX_BITS = 31
"""Widest multi-hot feature: it travels as one int32 word."""


@dataclass(frozen=True)
class Feature:
    """One side feature of an item, a user or the request's context; one 4-byte word a value.

    Attributes:
        name: unique within its group.
        kind: `categorical` is an int32 in [0, size); `bits` is a multi-hot int32 of `size` bits;
            `numeric` is a float32.
        size: number of values (categorical) or of bits (bits, at most 31); 0 for numeric.
    """

    name: str
    kind: Literal["categorical", "numeric", "bits"]
    size: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("categorical", "numeric", "bits"):
            raise ValueError(f"feature {self.name!r} has kind {self.kind!r}, not categorical, numeric or bits")
        if not self.name.isidentifier():
            raise ValueError(f"feature name {self.name!r} is not an identifier")
        if self.kind == "numeric" and self.size != 0:
            raise ValueError(f"feature {self.name!r} is numeric: leave its size at 0, not {self.size}")
        if self.kind == "categorical" and not 0 < self.size <= 2**31 - 1:
            raise ValueError(f"feature {self.name!r} is categorical: size must be positive, not {self.size}")
        if self.kind == "bits" and not 0 < self.size <= MAX_BITS:
            raise ValueError(f"feature {self.name!r} is bits: size must be 1..{MAX_BITS}, not {self.size}")

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 for numeric, int32 otherwise."""
        return np.dtype("<f4") if self.kind == "numeric" else np.dtype("<i4")

    @property
    def limit(self) -> int:
        """Values lie in [0, limit); meaningless for numeric."""
        return 1 << self.size if self.kind == "bits" else self.size


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
        item_features: candidate-side features, read from the store.
        user_features: read from the store with the user's history.
        context_features: sent with the request.
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
        whole = self.to_json()
        return _digest({k: whole[k] for k in ("actions", "item_features", "user_features")})


def record_dtype(features: tuple[Feature, ...]) -> np.dtype[Any]:
    """Structured dtype of one packed row of side features, 4 bytes a field."""
    return np.dtype([(f.name, f.dtype) for f in features])


def _unique(what: str, names: list[str] | tuple[str, ...]) -> None:
    if not names or len(set(names)) != len(names) or not all(names):
        raise ValueError(f"schema.{what} must be non-empty, distinct names, not {list(names)}")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
