"""A trace of requests by their sizes: a CSV file with a header, or JSON lines."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

MAX_HISTORY = 2**31 - 1

Rows = Iterator[tuple[int, Mapping[str, Any]]]
"""Line number and values by column."""


class TraceError(Exception):
    """The trace can't be used; the message is one clear line."""


@dataclass(frozen=True)
class Trace:
    """Requests in the order they came.

    Attributes:
        history: int64[n], events of the user.
        candidates: int64[n], items to score, at least 1.
        time: float64[n], seconds, ascending; None when the trace has no times.
    """

    history: np.ndarray
    candidates: np.ndarray
    time: np.ndarray | None


def read_trace(path: str | Path, *, max_candidates: int) -> Trace:
    """Read `history`, `candidates` and, optionally, `time` of a request a row; rows are sorted by time.

    Args:
        path: a file .csv or .jsonl.
        max_candidates: candidates of one request at most.

    Raises:
        TraceError: the file holds no requests, or a bad row, whose line, column and value are named.
        OSError: the file can't be opened.
    """
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    reader = readers.get(Path(path).suffix)
    if reader is None:
        raise TraceError(f"trace {path} must be a file .csv or .jsonl")
    history: list[int] = []
    candidates: list[int] = []
    times: list[float] = []
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in reader(file):
                number = line
                history.append(_whole(row, "history", 0, MAX_HISTORY))
                candidates.append(_whole(row, "candidates", 1, max_candidates))
                if "time" in row:
                    times.append(_seconds(row["time"]))
    except _BadLine as error:
        raise TraceError(f"trace {path}, line {error.number or number}: {error}") from None
    except UnicodeDecodeError:
        raise TraceError(f"trace {path} is not text in UTF-8, somewhere after line {number}") from None
    if not history:
        raise TraceError(f"trace {path} holds no requests")
    return _in_order(np.array(history, np.int64), np.array(candidates, np.int64), np.array(times) if times else None)


class _BadLine(Exception):
    """What is wrong; `number` is 0 for the line of the row that was read last."""

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.number = number


def _in_order(history: np.ndarray, candidates: np.ndarray, time: np.ndarray | None) -> Trace:
    if time is None:
        return Trace(history, candidates, None)
    order = np.argsort(time, kind="stable")
    return Trace(history[order], candidates[order], time[order])


def _csv_rows(file: TextIO) -> Rows:
    reader = csv.reader(file, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            return
        _check_columns(header, 1)
        for values in reader:
            if len(values) != len(header):
                raise _BadLine(f"has {len(values)} values, the header {len(header)} columns", reader.line_num)
            yield reader.line_num, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise _BadLine(f"is no CSV: {error}", reader.line_num) from None


def _json_rows(file: TextIO) -> Rows:
    first: set[str] | None = None
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise _BadLine(f"is no JSON: {_shown(line.strip())}", number) from None
        if not isinstance(row, dict):
            raise _BadLine(f"is no JSON object: {_shown(line.strip())}", number)
        if row.keys() != first:
            _check_columns(list(row), number)
            if first is not None:
                raise _BadLine("time is in some rows and not in others", number)
            first = set(row)
        yield number, row


def _check_columns(names: Sequence[str], number: int) -> None:
    if missing := [name for name in ("history", "candidates") if name not in names]:
        raise _BadLine(f"lacks the column {missing[0]}", number)
    if extra := [name for name in names if name not in ("history", "candidates", "time")]:
        raise _BadLine(f"names a column {_shown(extra[0])}: history, candidates and time are known", number)
    if len(set(names)) != len(names):
        raise _BadLine("names a column twice", number)


def _whole(row: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = row[name]
    if isinstance(value, str) and len(text := value.strip()) <= 20 and text.isascii() and text.isdigit():
        value = int(text)
    if type(value) is not int or not least <= value <= most:
        raise _BadLine(f"{name} is {_shown(row[name])}, not a whole number in [{least}, {most}]")
    return value


def _seconds(value: Any) -> float:
    try:
        seconds = float(value) if type(value) in (str, int, float) else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _BadLine(f"time is {_shown(value)}, not a number of seconds")
    return seconds


def _shown(value: Any) -> str:
    """A value in an error, cut."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
