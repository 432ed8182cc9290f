"""One column of a table and its plain conversions. Every refusal names table, column and row.

A row is named by its position in its whole table, the parts of a folder counted on; the first is row 0, and a
CSV file's header is none.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from flame_jax.data.errors import DataError


def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values without the encodings that a file may have chosen for them."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string_view(values.type):
        values = values.cast(pa.large_string())
    return values


class Column:
    """A column as its conversions see it.

    Args:
        table: table that has it.
        what: what messages call the table: `events`, `items` or `users`.
        name: of the column.
        role: what messages call its values.
    """

    def __init__(self, table: pa.Table, what: str, name: str, role: str) -> None:
        self.values = plain(table.column(name))
        self.what, self.name, self.role = what, name, role

    def __len__(self) -> int:
        return len(self.values)

    @property
    def is_text(self) -> bool:
        """Whether it holds strings."""
        return bool(pa.types.is_string(self.values.type) or pa.types.is_large_string(self.values.type))

    @property
    def is_integer(self) -> bool:
        """Whether it holds integers; booleans are none."""
        return bool(pa.types.is_integer(self.values.type))

    @property
    def is_floating(self) -> bool:
        """Whether it holds floats."""
        return bool(pa.types.is_floating(self.values.type))

    @property
    def is_boolean(self) -> bool:
        """Whether it holds truth values."""
        return bool(pa.types.is_boolean(self.values.type))

    def at(self, row: int, problem: str) -> DataError:
        """What is wrong in a row."""
        return DataError(f"row {row} of the {self.what}: {self.role} in column {self.name!r} {problem}")

    def mistyped(self, expected: str) -> DataError:
        """The column's type is none that can be read."""
        return DataError(f"{self.what}: column {self.name!r} holds {self.values.type}, {self.role} must be {expected}")

    def nulls(self) -> np.ndarray:
        """bool[n], where nothing is."""
        return self.values.is_null().to_numpy()  # type: ignore[no-any-return]

    def refuse_nulls(self, way_out: str = "") -> None:
        """Raise DataError when a value is missing."""
        if self.values.null_count:
            raise self.at(int(self.nulls().argmax()), f"is missing{way_out}")

    def integers(self, missing: int = 0) -> np.ndarray:
        """int64[n] of integers or booleans, `missing` standing for nulls. Raises DataError for one beyond int64."""
        values = self.values.cast(pa.uint8()) if self.is_boolean else self.values
        if pa.types.is_uint64(values.type):
            large = values.fill_null(0).to_numpy() > np.iinfo(np.int64).max
            if large.any():
                row = int(large.argmax())
                raise self.at(row, f"is {values[row]}, which does not fit int64")
        return values.cast(pa.int64()).fill_null(missing).to_numpy()  # type: ignore[no-any-return]

    def encoded(self) -> tuple[np.ndarray, list[str]]:
        """int32[n] codes, -1 for a null, and the text of each distinct value, in order of appearance."""
        whole = self.values.dictionary_encode().combine_chunks()
        codes = whole.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        return codes, whole.dictionary.cast(pa.large_string()).to_pylist()
