"""Reading a trace: both formats alike, every bad row by its line, name and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax.trace import TraceError, read_trace

ROWS = st.lists(
    st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 100), st.floats(allow_nan=False, allow_infinity=False)),
    min_size=1,
    max_size=20,
)


@settings(max_examples=100)
@given(ROWS, st.booleans())
def test_both_formats_give_the_same_requests_in_the_order_of_their_times(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, float]], timed: bool
) -> None:
    folder = tmp_path_factory.mktemp("trace")
    names = ["candidates", "history", "time"][: 2 + timed]
    values = [[c, h, t][: 2 + timed] for h, c, t in rows]
    csv, jsonl = folder / "t.csv", folder / "t.jsonl"
    csv.write_text("\n".join([",".join(names), *(",".join(map(repr, row)) for row in values)]))
    jsonl.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in values))
    expected = sorted(rows, key=lambda row: row[2]) if timed else rows
    for path in (csv, jsonl):
        trace = read_trace(path, max_candidates=100)
        assert trace.history.tolist() == [history for history, _, _ in expected]
        assert trace.candidates.tolist() == [candidates for _, candidates, _ in expected]
        assert (None if trace.time is None else trace.time.tolist()) == ([t for _, _, t in expected] if timed else None)


def test_a_file_of_another_system_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b'\xef\xbb\xbfhistory, candidates\r\n"3", 4\r\n0,1\r\n')
    trace = read_trace(path, max_candidates=9)
    assert (trace.history.tolist(), trace.candidates.tolist()) == ([3, 0], [4, 1])


HEADER = "history,candidates\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "", "holds no requests"),
        ("t.csv", HEADER, "holds no requests"),
        ("t.jsonl", "", "holds no requests"),
        ("t.txt", "", "must be a file .csv or .jsonl"),
        ("t.csv", "1,2\n", "line 1: lacks the column history"),
        ("t.csv", "history\n1\n", "line 1: lacks the column candidates"),
        ("t.csv", "history,candidates,user\n", "line 1: names a column 'user'"),
        ("t.csv", "history,candidates,history\n", "line 1: names a column twice"),
        ("t.csv", HEADER + "1,2\n3\n", "line 3: has 1 values, the header 2 columns"),
        ("t.csv", HEADER + "1,2\n\n3,4\n", "line 3: has 0 values"),
        ("t.csv", HEADER + "1,2\n1,-2\n", "line 3: candidates is '-2'"),
        ("t.csv", HEADER + "1,0\n", "line 2: candidates is '0', not a whole number in [1, 100]"),
        ("t.csv", HEADER + "1,101\n", "line 2: candidates is '101', not a whole number in [1, 100]"),
        ("t.csv", HEADER + "1.5,2\n", "line 2: history is '1.5'"),
        ("t.csv", HEADER + "nan,2\n", "line 2: history is 'nan'"),
        ("t.csv", HEADER + "1_0,2\n", "line 2: history is '1_0'"),
        ("t.csv", HEADER + "٣,2\n", "line 2: history is '٣'"),
        ("t.csv", HEADER + "2147483648,2\n", "line 2: history is '2147483648'"),
        ("t.csv", HEADER + "9" * 5000 + ",2\n", "line 2: history is '9999"),
        ("t.csv", "time," + HEADER + "inf,1,2\n", "line 2: time is 'inf', not a number of seconds"),
        ("t.csv", "time," + HEADER + "noon,1,2\n", "line 2: time is 'noon'"),
        ("t.csv", HEADER + '1,"2\n', "is no CSV"),
        ("t.jsonl", '{"history": 1, "candidates": 2}\n{"history": 1}\n', "line 2: lacks the column candidates"),
        ("t.jsonl", '{"history": 1, "candidates": 2}\nnope\n', "line 2: is no JSON: 'nope'"),
        ("t.jsonl", "[1, 2]\n", "line 1: is no JSON object"),
        ("t.jsonl", "[" * 100_000 + "\n", "line 1: is no JSON"),
        ("t.jsonl", '{"history": true, "candidates": 2}\n', "line 1: history is True"),
        ("t.jsonl", '{"history": 1, "candidates": 2.0}\n', "line 1: candidates is 2.0"),
        ("t.jsonl", '{"history": 1, "candidates": null}\n', "line 1: candidates is None"),
        ("t.jsonl", '{"history": 1, "candidates": 2, "time": NaN}\n', "line 1: time is nan"),
        (
            "t.jsonl",
            '{"history": 1, "candidates": 2, "time": 0}\n{"history": 1, "candidates": 2}\n',
            "line 2: time is in some rows",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_bad_trace_is_refused_by_line_name_and_value(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError) as refused:
        read_trace(path, max_candidates=100)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 300 + len(str(path))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"history,candidates\n1,2\n\xff\xfe,3\n")
    with pytest.raises(TraceError, match="UTF-8"):
        read_trace(path, max_candidates=100)
