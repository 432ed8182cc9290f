"""Which columns of a log an import needs, from the schema and the settings. No file or table is touched here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flame_jax.data.errors import DataError
from flame_jax.feature_config import DataConfig
from flame_jax.schema import Feature, FeatureSchema


@dataclass
class Wanted:
    """The needed columns of one table.

    Attributes:
        columns: their names, none twice.
        text: those that are text even where every value looks like a number, which a CSV file can't say.
        keys: those that are text unless every value is an integer.
    """

    columns: list[str] = field(default_factory=list)
    text: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)

    def add(self, name: str, kind: str = "") -> None:
        """Add a column of kind `text`, `keys` or, when its values say themselves what they are, ""."""
        if name and name not in self.columns:
            self.columns.append(name)
        if name and kind:
            {"text": self.text, "keys": self.keys}[kind].add(name)


@dataclass(frozen=True)
class Plan:
    """What is read from where.

    Attributes:
        item_columns: the column of each stored item feature.
        user_columns: the column of each user feature.
        events: columns of the log.
        items: columns of the table of items; None without one, when the log has them.
        users: likewise of the users'.
    """

    item_columns: tuple[tuple[Feature, str], ...]
    user_columns: tuple[tuple[Feature, str], ...]
    events: Wanted
    items: Wanted | None
    users: Wanted | None


def make_plan(schema: FeatureSchema, settings: DataConfig, *, items: bool, users: bool) -> Plan:
    """Plan an import with or without tables of items and users.

    Raises:
        DataError: the settings don't fit the schema.
    """
    if settings.actions and len(settings.actions) != schema.actions:
        raise DataError(f"data.actions names {len(settings.actions)} actions, schema.actions is {schema.actions}")
    groups = {"item": schema.stored_item_features, "user": schema.user_features}
    _check_names(groups, settings.columns)
    columns = {
        group: tuple((f, settings.columns.get(f"{group}.{f.name}", settings.columns.get(f.name, f.name))) for f in fs)
        for group, fs in groups.items()
    }
    log = Wanted()
    log.add(settings.user_column, "text")
    log.add(settings.item_column, "keys")
    log.add(settings.time_column)
    log.add(settings.action_column, "text" if any(isinstance(a, str) for a in settings.actions) else "")
    tables = {"item": Wanted() if items else log, "user": Wanted() if users else log}
    tables["item"].add(settings.item_column, "keys")
    tables["item"].add(settings.title_column, "text")
    tables["user"].add(settings.user_column, "text")
    for group, pairs in columns.items():
        for feature, column in pairs:
            tables[group].add(column, "keys" if feature.kind == "id" else "")
    return Plan(
        item_columns=columns["item"],
        user_columns=columns["user"],
        events=log,
        items=tables["item"] if items else None,
        users=tables["user"] if users else None,
    )


def require(what: str, wanted: Sequence[str], there: Iterable[str]) -> None:
    """Raise DataError unless every wanted column is among those of a table, once."""
    counts = Counter(there)
    if missing := [name for name in wanted if name not in counts]:
        raise DataError(f"{what}: no column {', '.join(map(repr, missing))}; there are {', '.join(counts) or 'none'}")
    if twice := [name for name in wanted if counts[name] > 1]:
        raise DataError(f"{what}: more than one column is named {', '.join(map(repr, twice))}")


def _check_names(groups: dict[str, tuple[Feature, ...]], columns: dict[str, str]) -> None:
    known = {name for group, fs in groups.items() for f in fs for name in (f.name, f"{group}.{f.name}")}
    if unknown := sorted(set(columns) - known):
        stored = [f"{group}.{f.name}" for group, fs in groups.items() for f in fs]
        raise DataError(
            f"data.columns names {', '.join(map(repr, unknown))}, which the store does not hold; "
            f"its features are {', '.join(stored) or 'none'}"
        )
