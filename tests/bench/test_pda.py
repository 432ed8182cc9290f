"""The benchmarks of the feature path, small: what they compute and count, not how fast it is."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bench.modes import Mode
from bench.pda import __main__ as command
from bench.pda import assembly, faults, host_rows, staleness, transfers
from bench.pda import table as ablation
from bench.pda.pipeline import FieldByField
from flame_jax.commandline import load
from flame_jax.packing import Bucket, slot_layout
from flame_jax.pda.records import UserRecord, feature_row, item_dtype
from flame_jax.pda.store import Fetched
from tests import tiny


def test_assembly_has_a_row_for_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "keys_of", lambda ids, random: np.arange(1, 1000, 1 if ids == "dense" else 3))
    cases = [assembly.Case(64, 64, ids, 1.0) for ids in ("dense", "5 million")]
    result = assembly.assembly(lambda _: None, cases, count=2)
    assert [(row["ids"], row["record_p50_us"] > 0) for row in result["assembly"]] == [
        ("dense", True),
        ("5 million", True),
    ]
    assert assembly.table(result).count("\n") == 3


def test_rows_of_a_table_are_copied_with_every_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rows, "TOKENS", 3000)
    monkeypatch.setattr(host_rows, "BATCHES", 2)
    monkeypatch.setattr(host_rows, "STEP", 999)
    result = host_rows.host_rows(lambda _: None, rows=5000)
    ways = {(row["asked"], row["held"], row["threads"]) for row in result["host_rows"]}
    assert ways == set(product(("uniform", "Zipf 1.0"), (0, 25, 250), host_rows.THREADS))
    copied = {(row["asked"], row["held"]): row["copied"] for row in result["host_rows"]}
    assert copied["uniform", 0] == copied["uniform", 250] == 1
    assert 0 < copied["Zipf 1.0", 250] < 0.5
    assert host_rows.table(result).count("\n") == len(ways) + 1


def test_calls_are_counted_under_faults_and_none_gets_anothers_value(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"none", "hangs"}
    chosen = [scenario for scenario in faults._scenarios() if scenario.name in wanted]
    monkeypatch.setattr(faults, "_scenarios", lambda: chosen)
    result = faults.faults(lambda _: None, seconds=0.3, calls=200)
    rows = {(row["scenario"], row["mode"]): row for row in result["faults"]}
    assert rows.keys() == {(name, mode) for name in wanted for mode in faults.MODES}
    assert sum(row["wrong"] for row in rows.values()) == 0
    assert all(row["recovery_seconds"] < 2 for row in rows.values())
    assert rows["hangs", "sync"]["failed"] > 0.9
    assert rows["hangs", "async"]["failed"] == 0
    assert result["cancels"]["calls"] == 200
    assert result["cancels"]["wrong"] == 0
    assert faults.table(result).count("\n") == 5


def test_a_value_of_another_key_is_told() -> None:
    items = np.zeros(2, item_dtype(faults.SCHEMA))
    asked = np.array([3, 4])
    items["id"] = items["number"] = asked
    record = UserRecord(faults._history(5), feature_row((), {}))
    whole = Fetched(record, items, np.ones(2, bool))
    assert faults.own(whole, 5, asked)
    assert not faults.own(whole, 6, asked), "another user's events"
    assert not faults.own(whole._replace(user=None), 5, asked), "a user who is there"
    assert faults.own(whole._replace(user=None, user_lost=True, degraded=True), 5, asked)
    other = items.copy()
    other["number"] = 9, 4
    assert not faults.own(whole._replace(items=other), 5, asked), "another item's number"
    other["number"] = 0, 4
    assert not faults.own(whole._replace(items=other), 5, asked), "a default, and not degraded"
    assert faults.own(whole._replace(items=other, degraded=True), 5, asked)


def test_the_table_of_staleness_shows_what_was_not_waited_for() -> None:
    row = {"case": "all", "auc": 0.75, "user_auc": 0.5, "log_loss": 1.0}
    rows = [row, row | {"degraded": 0.5, "stale": 0.25, "defaults": 0.125}]
    lines = staleness.table({"staleness": rows}).splitlines()
    assert lines[-2:] == [
        "| all | 0% | 0.0% | 0.0% | 0.7500 | 0.5000 | 1.0000 |",
        "| all | 50% | 25.0% | 12.5% | 0.7500 | 0.5000 | 1.0000 |",
    ]


def test_every_way_of_a_batch_brings_the_same_scores() -> None:
    scores = {name: wait(launch()) for name, (launch, wait) in transfers.ways(tiny.device()).items()}
    words = transfers.WORDS
    for name, found in scores.items():
        assert found.shape == transfers.SCORES
        np.testing.assert_array_equal(found, words if "slot" not in name else words - 64, err_msg=name)
    result = transfers.transfers(lambda _: None, calls=20, rounds=2)
    assert [row["way"] for row in result["transfers"]] == list(scores)
    assert all(row["launch_us"] <= row["p50_us"] <= row["p99_us"] for row in result["transfers"])
    assert transfers.table(result).count("\n") == len(scores) + 1


def test_drawn_candidates_are_distinct_and_follow_zipfs_law() -> None:
    drawn = ablation.drawn(np.random.default_rng(0), 1000, 400)
    assert all(len(set(row)) == ablation.CANDIDATES for row in drawn.tolist())
    counts = np.sort(np.bincount(drawn.ravel(), minlength=1000))[::-1]
    assert counts[0] == 400, "the first is in every call"
    assert counts[:10].sum() > 30 * counts[500:510].sum() / 10


def test_the_table_has_a_row_for_each_way_to_serve_and_scores_come_back() -> None:
    config = load(["--config", "configs/climber_base.yaml"], prog="test")
    size = ablation.Size(items=20_000, users=20, events=300, seconds=0.5)
    rows = (ablation.ROWS[0], ablation.ROWS[-1])
    result = ablation.ablation(config, lambda _: None, size, (0.2,), rows)
    plain, best = result["table"]
    assert result["program"] == "Trivial"
    assert (plain["memory"], best["memory"]) == ("pageable", "in place")
    assert (plain["cache_hits"], plain["degraded"]) == (None, 0)
    assert 0.1 < best["cache_hits"] < 1
    for row in (plain, best):
        assert row["calls_per_second"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["store_mb_per_second"] > 0
    assert ablation.table(result).count("\n") == 3
    assert ablation.plot(result).count('class="bar"') == ablation.plot(result).count('class="first"') == 3


def test_fields_brought_one_by_one_are_the_slot() -> None:
    slot = slot_layout(tiny.SCHEMA, tiny.LAYOUT, tiny.BUCKETS[0])
    words = np.random.default_rng(0).integers(-9, 9, slot.words).astype(np.int32)
    views = dict(slot.views(words))
    gaps = words.copy()
    for field in slot.views(gaps).values():
        field.fill(0)

    class Engine:
        slots: ClassVar = {tiny.BUCKETS[0]: slot}

        def launch(self, bucket: Bucket, joined: Any, hot: Any = None) -> Any:
            return joined

    joined = np.asarray(FieldByField(Engine(), tiny.device()).launch(tiny.BUCKETS[0], words))
    for name, values in slot.views(joined.copy()).items():
        assert values.tobytes() == views[name].tobytes(), name
    assert not (joined - (words - gaps)).any(), "words between fields are zero"


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"found": 1, "none": [float("nan")]}
    monkeypatch.setitem(command.MODES, "rows", Mode("help", lambda _: found, str, lambda _: {"drawn": "<svg/>"}))
    command.main(["--rows", "--out", str(tmp_path), "--commit", "abc"])
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert (saved["found"], saved["none"], saved["commit"]) == (1, [None], "abc")
    assert saved["command"] == "python -m bench.pda --rows --out DIR", "without this machine's paths"
    assert (tmp_path / "drawn.svg").read_text() == "<svg/>"
    with pytest.raises(SystemExit):
        command.main([])
