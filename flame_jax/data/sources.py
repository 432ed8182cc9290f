"""Files of a log as Arrow tables: Parquet and CSV, one file or a folder of parts.

Only the wanted columns are read, and they are held in memory as the file types them: 8 bytes a number, and of text
its bytes and 4 to 8 more.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from flame_jax.data.columns import plain
from flame_jax.data.errors import DataError
from flame_jax.data.plan import Wanted, require

_PARQUET, _CSV, _CSV_GZ = ".parquet", ".csv", ".csv.gz"
_INTEGER = r"^(0|-?[1-9][0-9]*)$"
_INTEGER_OR_FLOAT = r"^(0|-?[1-9][0-9]*)(\.0)?$"

Report = Callable[[int], object]
"""Told of so many bytes more that have been read."""


def read_table(path: str | Path, wanted: Wanted, what: str) -> pa.Table:
    """Read the wanted columns of a file, or of a folder's parts in the order of their names.

    In a CSV file an empty cell is a null, and nothing else is.

    Args:
        path: `.parquet`, `.csv` or `.csv.gz`, or a folder that holds one of these kinds directly; other files in
            it, and those whose names begin with "." or "_", are passed over.
        wanted: the columns.
        what: what messages call the table.

    Raises:
        DataError: no such file, another format, a damaged file, a missing column, or parts whose types disagree.
    """
    files = _files(Path(path), what)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc=f"read {what}", unit="B", unit_scale=True, disable=None) as bar:
        parts = [_read_parquet(f, wanted, bar.update) if _kind(f) == _PARQUET else _read_csv(f, wanted, bar.update)
                 for f in files]  # fmt: skip
    table = _concatenated(files, parts, wanted.columns)
    if _kind(files[0]) != _PARQUET:
        for name in wanted.keys:
            at = table.column_names.index(name)
            table = table.set_column(at, name, _integers_if_all(table.column(name), name, what))
    return table


def _kind(file: Path) -> str:
    return next((kind for kind in (_PARQUET, _CSV_GZ, _CSV) if file.name.endswith(kind)), "")


def _files(path: Path, what: str) -> list[Path]:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{what}: there is no {path}")
        if not _kind(path):
            raise DataError(f"{what}: {path} is neither {_PARQUET}, {_CSV} nor {_CSV_GZ}")
        return [path]
    inside = sorted(f for f in path.iterdir() if _kind(f) and f.name[0] not in "._" and f.is_file())
    if not inside:
        raise DataError(f"{what}: folder {path} holds no {_PARQUET}, {_CSV} or {_CSV_GZ} file")
    if len({_kind(f) == _PARQUET for f in inside}) > 1:
        raise DataError(f"{what}: folder {path} holds both Parquet and CSV files")
    return inside


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
        raise DataError(f"{file} can't be read: {error}") from error


def _read_parquet(file: Path, wanted: Wanted, report: Report) -> pa.Table:
    with _reading(file), pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        require(str(file), wanted.columns, schema.names)
        fields = pa.schema([schema.field(name) for name in wanted.columns])
        groups, size = parquet.num_row_groups, file.stat().st_size
        parts = []
        for group in range(groups):
            parts.append(parquet.read_row_group(group, columns=wanted.columns).select(wanted.columns))
            report(size * (group + 1) // groups - size * group // groups)
        table = pa.concat_tables(parts) if parts else fields.empty_table()
    return pa.table({name: plain(table.column(name)) for name in wanted.columns})


def _read_csv(file: Path, wanted: Wanted, report: Report) -> pa.Table:
    opened = gzip.open if _kind(file) == _CSV_GZ else open
    with _reading(file), opened(file, "rt", encoding="utf-8-sig", errors="replace", newline="") as text:
        require(str(file), wanted.columns, next(csv.reader(text), []))
    types = dict.fromkeys(wanted.text | wanted.keys, pa.string())
    with _reading(file), file.open("rb") as raw:
        stream = pa.PythonFile(CallbackIOWrapper(report, raw, "read"), mode="r")
        return arrow_csv.read_csv(
            pa.CompressedInputStream(stream, "gzip") if _kind(file) == _CSV_GZ else stream,
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=wanted.columns, column_types=types, null_values=[""], strings_can_be_null=True
            ),
        )


def _concatenated(files: list[Path], parts: list[pa.Table], names: list[str]) -> pa.Table:
    """All parts as one; a type gives way where that loses nothing, as integers do to floats."""
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except pa.ArrowException as error:
        for name in names:
            first = parts[0].schema.field(name).type
            for file, part in zip(files, parts, strict=True):
                try:
                    pa.unify_schemas([pa.schema({name: first}), pa.schema({name: part.schema.field(name).type})],
                                     promote_options="permissive")  # fmt: skip
                except pa.ArrowException:
                    other = part.schema.field(name).type
                    raise DataError(f"column {name!r} holds {first} in {files[0]} and {other} in {file}") from error
        raise DataError(f"the parts of {files[0].parent} disagree: {error}") from error


def _integers_if_all(texts: pa.ChunkedArray, name: str, what: str) -> pa.ChunkedArray:
    """int64 when every text is an integer as it is written by rule, so that nothing is lost; else the texts."""
    if texts.null_count == len(texts):
        return texts
    if not _all_match(texts, _INTEGER):
        if _all_match(texts, _INTEGER_OR_FLOAT):
            raise DataError(f"{what}: column {name!r} holds integers written as floats (1.0): write them as 1")
        return texts
    try:
        return texts.cast(pa.int64())
    except pa.ArrowInvalid as error:
        long = np.flatnonzero(pc.greater_equal(pc.utf8_length(texts), 19).fill_null(False).to_numpy())
        row = next(int(r) for r in long if not -(2**63) <= int(texts[r].as_py()) < 2**63)
        raise DataError(f"row {row} of the {what}: {texts[row]} in column {name!r} does not fit int64") from error


def _all_match(texts: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(texts, pattern)).as_py())
