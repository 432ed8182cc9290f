"""Files as tables: which columns, which types, which parts, in which order."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flame_jax.data.errors import DataError
from flame_jax.data.plan import Wanted
from flame_jax.data.sources import read_table
from tests.data.logs import write

FORMATS = ["parquet", "csv", "csv.gz"]


def read(path: Path, *columns: str, text: str = "", keys: str = "") -> pa.Table:
    return read_table(path, Wanted(list(columns), set(text.split()), set(keys.split())), "events")


@pytest.mark.parametrize("ending", FORMATS)
def test_the_wanted_columns_come_in_the_files_order_of_rows(tmp_path: Path, ending: str) -> None:
    columns = {"a": list(range(10)), "b": ["x"] * 10, "c": [i / 2 for i in range(10)]}
    path = write(tmp_path / f"log.{ending}", columns)
    assert read(path, "c", "a").to_pydict() == {"c": columns["c"], "a": columns["a"]}


@pytest.mark.parametrize("ending", FORMATS)
def test_parts_are_read_by_name_and_other_files_passed_over(tmp_path: Path, ending: str) -> None:
    for name, values in {"part-10": [3], "part-02": [2, 2], "part-01": [1]}.items():
        write(tmp_path / f"{name}.{ending}", {"a": values})
    for name in ("_SUCCESS", f".part-00.{ending}", f"_part-00.{ending}", "notes.txt"):
        (tmp_path / name).write_text("no part")
    (tmp_path / f"folder.{ending}").mkdir()
    assert read(tmp_path, "a")["a"].to_pylist() == [1, 2, 2, 3]


def test_parts_may_be_compressed_or_not(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", {"a": [2]})
    write(tmp_path / "a.csv.gz", {"a": [1]})
    assert read(tmp_path, "a")["a"].to_pylist() == [1, 2]


@pytest.mark.parametrize("ending", FORMATS)
def test_types_of_parts_give_way_where_nothing_is_lost(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"1.{ending}", {"a": [1], "b": [None]})
    write(tmp_path / f"2.{ending}", {"a": [1.5], "b": [7]})
    assert read(tmp_path, "a", "b").to_pydict() == {"a": [1.0, 1.5], "b": [None, 7]}


@pytest.mark.parametrize("ending", FORMATS)
def test_parts_whose_types_disagree_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"1.{ending}", {"a": [1], "b": [1]})
    write(tmp_path / f"2.{ending}", {"a": [2], "b": ["x"]})
    with pytest.raises(DataError, match=r"column 'b' holds int64 in .*1\..* and string in .*2\."):
        read(tmp_path, "a", "b")


def test_in_csv_only_an_empty_cell_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", {"t": ["NA", "null", None, "NaN"], "n": [1, None, 2, 3]})
    assert read(path, "t", "n", text="t").to_pydict() == {"t": ["NA", "null", None, "NaN"], "n": [1, None, 2, 3]}


def test_in_csv_text_stays_as_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", {"t": ["007", "1e3", "a,b", 'say "x"\nand y', "☃"], "n": range(5)})
    assert read(path, "t", "n", text="t")["t"].to_pylist() == ["007", "1e3", "a,b", 'say "x"\nand y', "☃"]


def test_text_of_many_lines_may_be_longer_than_what_is_parsed_at_once(tmp_path: Path) -> None:
    texts = [f"{i}\n" * 40_000 for i in range(40)]
    path = write(tmp_path / "log.csv", {"t": texts, "n": range(40)})
    assert read(path, "t", "n", text="t").to_pydict() == {"t": texts, "n": list(range(40))}


def test_a_byte_order_mark_belongs_to_no_name(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbfa,b\n1,2\n")
    assert read(tmp_path / "log.csv", "a").to_pydict() == {"a": [1]}


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["0", "12", "-3", str(2**63 - 1)], [0, 12, -3, 2**63 - 1]),
        (["12", None], [12, None]),
        (["12", "7a"], ["12", "7a"]),
        (["12", "007"], ["12", "007"]),
        (["12", "+7"], ["12", "+7"]),
        (["1.10", "2.0"], ["1.10", "2.0"]),
        ([None, None], [None, None]),
    ],
    ids=["integers", "a missing one", "a letter", "leading zeros", "a sign", "versions", "nothing yet"],
)
def test_keys_of_csv_are_integers_only_if_nothing_is_lost(
    tmp_path: Path, texts: list[str | None], values: list[object]
) -> None:
    # The second part alone would be all integers.
    write(tmp_path / "1.csv", {"k": texts, "n": range(len(texts))})
    write(tmp_path / "2.csv", {"k": ["5"], "n": [0]})
    last: object = 5 if all(isinstance(value, int | None) for value in values) else "5"
    assert read(tmp_path, "k", "n", keys="k")["k"].to_pylist() == [*values, last]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["1", "99999999999999999999"], "row 1 of the events: 99999999999999999999 in column 'k' does not fit int64"),
        (["1.0", "2"], "column 'k' holds integers written as floats"),
    ],
)
def test_keys_of_csv_that_would_become_others_are_refused(tmp_path: Path, texts: list[str], words: str) -> None:
    path = write(tmp_path / "log.csv", {"k": texts, "n": range(len(texts))})
    with pytest.raises(DataError, match=words):
        read(path, "k", "n", keys="k")


def test_dictionaries_of_parquet_are_what_they_stand_for(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", {"a": pa.array(["x", "y", "x", None] * 2).dictionary_encode()})
    table = read(path, "a")
    assert table["a"].to_pylist() == ["x", "y", "x", None] * 2
    assert table.schema.field("a").type == pa.string()


def test_a_file_without_rows_is_an_empty_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "log.parquet")
    (tmp_path / "log.csv").write_text("a\n")
    for name in ("log.parquet", "log.csv"):
        assert read(tmp_path / name, "a").to_pydict() == {"a": []}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def raw(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("none.csv", lambda path: None, "events: there is no "),
        ("log.txt", raw(b"a\n1\n"), "is neither .parquet, .csv nor .csv.gz"),
        ("folder", Path.mkdir, "holds no .parquet, .csv or .csv.gz file"),
        ("log.csv", raw(b""), "no column 'a'; there are none"),
        ("log.csv", raw(b"b,c\n1,2\n"), "no column 'a'; there are b, c"),
        ("log.csv", raw(b"a,b,a\n1,2,3\n"), "more than one column is named 'a'"),
        ("log.csv", raw(b"a,b\n1,2\n3\n"), "can't be read: .*Expected 2 columns, got 1"),
        ("log.csv", raw(b"a,b\n1,2\n\xff,2\n"), "can't be read: .*invalid UTF8"),
        ("log.csv", raw("a,b\n1,2\n".encode("utf-16")), "no column 'a'"),
        ("log.csv.gz", raw(b"a,b\n1,2\n"), "can't be read: "),
        ("log.csv.gz", raw(gzip.compress(b"a,b\n" + bytes(range(48, 58)) * 999)[:-40]), "can't be read: "),
        ("log.parquet", raw(b"a,b\n1,2\n"), "can't be read: "),
        ("log.parquet", lambda path: truncated(write(path, {"a": [1]})), "can't be read: "),
        ("log.parquet", lambda path: write(path, {"b": [1], "c": [1]}), "no column 'a'; there are b, c"),
    ],
)
def test_what_is_no_table_of_the_column_is_refused_by_name(
    tmp_path: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=words) as error:
        read(tmp_path / name, "a", text="a")
    assert name in str(error.value)


def test_a_folder_of_two_formats_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", {"a": [1]})
    write(tmp_path / "log.parquet", {"a": [1]})
    with pytest.raises(DataError, match="both Parquet and CSV"):
        read(tmp_path, "a")
