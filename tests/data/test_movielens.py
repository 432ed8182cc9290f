"""MovieLens-100K from hand-made files of the same form."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from flame_jax.data import movielens
from flame_jax.data.__main__ import main
from flame_jax.data.errors import DataError
from flame_jax.data.movielens import GENRES, STORE_SCHEMA
from flame_jax.pda.lmdb_store import LmdbStore
from flame_jax.pda.records import item_dtype
from flame_jax.pda.store import StoreError

EVENTS = """\
user_id:token\titem_id:token\trating:float\ttimestamp:float
7\t30\t5\t881250949
7\t10\t1\t881250949
42\t10\t3\t891717742
7\t20\t4\t881250948
7\t9\t2\t881250949.0
42\t30\t4.0\t5
"""
ITEMS = """\
item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
30\tToy Story\t1995\tAnimation Children's Comedy
10\t"Quoted\t\tunknown
20\tM\u00e4dchen in Uniform\t1931\tDrama
9\tFilm Noir\t2001\tFilm-Noir Sci-Fi NoSuchGenre
"""
USERS = """\
user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
7\t24\tM\ttechnician\t85711
42\t56\tF\twriter\tT8H1N
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, EVENTS, ITEMS, USERS)


def write(tmp_path: Path, events: str, items: str, users: str) -> Path:
    folder = tmp_path / "recbole" / "dataset_example" / "ml-100k"
    folder.mkdir(parents=True)
    for kind, text in (("inter", events), ("item", items), ("user", users)):
        (folder / f"ml-100k.{kind}").write_text(text, encoding="utf-8")
    return folder


def bits(*genres: str) -> int:
    return sum(1 << GENRES.index(genre) for genre in genres)


def test_histories_are_sorted_by_time_then_item_and_ratings_are_actions(folder: Path) -> None:
    histories = movielens.read_histories(folder / "ml-100k.inter")
    assert sorted(histories) == ["42", "7"]
    seven = histories["7"]
    assert seven.item_ids.tolist() == [20, 9, 10, 30]
    assert seven.actions.tolist() == [3, 1, 0, 4]
    assert seven.timestamps.tolist() == [881250948, 881250949, 881250949, 881250949]
    columns = (seven.item_ids, seven.actions, seven.timestamps)
    assert [str(column.dtype) for column in columns] == ["int64", "int32", "int64"]
    assert histories["42"].item_ids.tolist() == [30, 10]
    for history in histories.values():
        history.check(STORE_SCHEMA.actions)


def test_the_order_of_events_does_not_depend_on_the_order_of_lines(folder: Path) -> None:
    before = movielens.read_histories(folder / "ml-100k.inter")
    header, *lines = EVENTS.splitlines()
    (folder / "ml-100k.inter").write_text("\n".join([header, *reversed(lines)]) + "\n")
    after = movielens.read_histories(folder / "ml-100k.inter")
    for user, history in before.items():
        assert after[user].item_ids.tolist() == history.item_ids.tolist()
        assert after[user].actions.tolist() == history.actions.tolist()


def test_items_carry_genres_decade_and_title(folder: Path) -> None:
    rows, titles = movielens.read_items(folder / "ml-100k.item")
    assert rows.dtype == item_dtype(STORE_SCHEMA)
    assert rows["id"].tolist() == [30, 10, 20, 9]
    assert rows["genres"].tolist() == [
        bits("Animation", "Children's", "Comedy"),
        bits("unknown"),
        bits("Drama"),
        bits("Film-Noir", "Sci-Fi"),
    ]
    np.testing.assert_allclose(rows["decade"], [1.5, 0.0, -4.9, 2.1], rtol=1e-6)
    assert titles == {
        30: "Toy Story (1995)",
        10: '"Quoted',
        20: "M\u00e4dchen in Uniform (1931)",
        9: "Film Noir (2001)",
    }


def test_a_genre_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    folder = write(tmp_path, EVENTS, ITEMS.replace("\tDrama", "\tDrama War Drama"), USERS)
    rows, _ = movielens.read_items(folder / "ml-100k.item")
    assert rows["genres"][2] == bits("Drama", "War")


@pytest.mark.parametrize(
    ("age", "bucket"), [(1, 0), (17, 0), (18, 1), (24, 1), (25, 2), (44, 3), (45, 4), (55, 5), (56, 6), (99, 6)]
)
def test_ages_fall_into_seven_groups(age: int, bucket: int, tmp_path: Path) -> None:
    folder = write(tmp_path, EVENTS, ITEMS, USERS.replace("\t24\t", f"\t{age}\t"))
    features = dict(movielens.read_users(folder / "ml-100k.user"))
    assert features["7"]["age"] == bucket


def test_users_carry_gender_and_occupation(folder: Path) -> None:
    features = dict(movielens.read_users(folder / "ml-100k.user"))
    assert [int(features[user]["gender"]) for user in ("7", "42")] == [0, 1]
    assert movielens.OCCUPATIONS[features["7"]["occupation"]] == "technician"
    assert movielens.OCCUPATIONS[features["42"]["occupation"]] == "writer"


def install(monkeypatch: pytest.MonkeyPatch, root: Path, *names: str) -> None:
    """Make `recbole` look installed with these files."""

    class File(importlib.metadata.PackagePath):
        def locate(self) -> Path:
            return root / str(self)

    def files(distribution: str) -> list[importlib.metadata.PackagePath]:
        assert distribution == "recbole"
        return [File(name) for name in names]

    monkeypatch.setattr(importlib.metadata, "files", files)


def test_the_data_set_is_found_inside_the_installed_wheel(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("recbole/__init__.py", "recbole/dataset_example/ml-100k/ml-100k.inter")
    install(monkeypatch, tmp_path, *names)
    assert movielens.locate() == folder


@pytest.mark.parametrize("names", [None, (), ("recbole/__init__.py",)], ids=["absent", "no record", "without data"])
def test_without_the_wheel_one_line_says_what_to_install(
    names: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if names is None:

        def absent(distribution: str) -> None:
            raise importlib.metadata.PackageNotFoundError(distribution)

        monkeypatch.setattr(importlib.metadata, "files", absent)
    else:
        install(monkeypatch, tmp_path, *names)
    with pytest.raises(DataError, match="pip install"):
        movielens.locate()
    with pytest.raises(SystemExit) as ended:
        main(["import", "ml-100k", "--store", str(tmp_path / "store")])
    assert ended.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "recbole" in lines[0]
    assert not (tmp_path / "store").exists()


def test_what_is_imported_can_be_read_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, tmp_path, "recbole/dataset_example/ml-100k/ml-100k.inter")
    main(["import", "ml-100k", "--store", str(tmp_path / "store")])
    assert "2 users, 4 items and 6 events" in capsys.readouterr().out
    store = LmdbStore(tmp_path / "store", STORE_SCHEMA)
    assert list(store.users()) == ["42", "7"]
    assert store.item_ids().tolist() == [9, 10, 20, 30]
    fetched = store.read("7", np.array([30, 10, 12345], np.int64))
    assert fetched.user is not None
    assert fetched.user.history.item_ids.tolist() == [20, 9, 10, 30]
    assert fetched.user.history.actions.tolist() == [3, 1, 0, 4]
    assert fetched.user.features["age"] == 1
    assert fetched.found.tolist() == [True, True, False]
    assert fetched.items["genres"].tolist() == [bits("Animation", "Children's", "Comedy"), bits("unknown"), 0]
    assert store.titles([20, 12345]) == ["M\u00e4dchen in Uniform (1931)", None]
    store.close()


def test_importing_twice_into_one_folder_is_refused_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, tmp_path, "recbole/dataset_example/ml-100k/ml-100k.inter")
    command = ["import", "ml-100k", "--store", str(tmp_path / "store")]
    main(command)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "exists already" in lines[0]


def test_an_import_that_breaks_off_leaves_no_readable_store_and_can_be_repeated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, tmp_path, "recbole/dataset_example/ml-100k/ml-100k.inter")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flame_jax.pda.lmdb_store.LmdbWriter.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            movielens.import_ml_100k(tmp_path / "store")
    with pytest.raises(StoreError, match="incomplete"):
        LmdbStore(tmp_path / "store")
    assert movielens.import_ml_100k(tmp_path / "store") == (2, 4, 6)
