"""The benchmarks of the dispatcher, small: what they count and compare, not how fast it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from bench.dso import __main__ as command
from bench.dso import host, overload, simulate, soak, table
from bench.dso.curves import draw
from bench.dso.load import Load
from bench.dso.scale import Scale, scale_of
from bench.dso.systems import emulated
from bench.dso.traffic import Mix, heavy, paper
from flame_jax.packing import Bucket, Extent


def small(name: str, device: jax.Device) -> Scale:
    """Two sizes of request, two buckets."""
    config = scale_of("paper", device).config
    mix = Mix("small", (Extent(16, 8), Extent(64, 24)))
    return Scale(config, mix, ((128, 32), (512, 128)), (1, 2), implicit=True, inside=8)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Each is built once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (table, overload, soak):
            patch.setattr(module, "scale_of", small)
        yield tmp_path_factory.mktemp("artifacts")


def test_the_papers_mix_and_the_heavy_tailed_one() -> None:
    assert [shape.candidates for shape in paper(2).shapes] == [128, 256, 512, 1024]
    assert {shape.history for shape in paper(2).shapes} == {512}
    sizes = heavy(1).shapes
    assert 64 <= min(s.history for s in sizes) < 200 < 2000 < max(s.history for s in sizes) <= 4096
    assert 16 <= min(s.candidates for s in sizes) < 1000 < max(s.candidates for s in sizes) <= 2048
    arrivals = list(paper(2).arrivals(1000, 3, seed=1))
    assert len(arrivals) == 3000
    assert arrivals[-1].time == pytest.approx(3, rel=0.1)


def test_simulated_batches_take_longer_in_larger_buckets_and_beside_others() -> None:
    measured = simulate.measured(simulate.PAPER, 4)
    alone = [seconds[0] for _, seconds in sorted(measured.items())]
    assert alone == sorted(alone)
    assert all(seconds == sorted(seconds) for seconds in measured.values())
    # Four lanes do more than one, in every bucket.
    assert all(4 * seconds[0] > seconds[3] for seconds in measured.values())


def test_the_simulation_has_a_row_for_every_policy_and_number_of_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "MOST", 150)
    result = simulate.simulate(lambda _: None)
    rows = {(row["mix"], row["policy"], row["lanes"]): row["requests_per_second"] for row in result["simulate"]}
    assert len(rows) == 2 * 2 * 3
    for mix in ("paper", "heavy"):
        assert rows[mix, "deadline_cost", 1] > rows[mix, "descending", 1], "batching requests is worth something"
    assert simulate.table(result).count("\n") == 13
    assert simulate.plots(result).keys() == {"simulate_paper", "simulate_heavy"}


def test_every_request_of_a_load_is_counted_once() -> None:
    device = jax.devices("cpu")[0]
    scale = small("paper", device)
    system = emulated(scale.config, {Bucket(128, 32): [1e-3, 1e-3], Bucket(512, 128): [2e-3, 2e-3]}, 2, device)
    load = Load(system, scale.mix, 100)
    try:
        one = load.open(500.0, 0.2)
        assert one.outcomes == {"ok": 100}
        assert one.ms["mean"] > 1.0, "a batch takes a millisecond"
        assert 0 <= one.padding < 1
        assert one.requests_per_batch >= 1
        assert one.pairs == pytest.approx(one.answered * 16, rel=0.2)
        most = load.closed(8, 0.2)
        assert set(most.outcomes) == {"ok"}
        assert 0 < most.occupancy <= 1
        late = load.open(500.0, 0.2, patience=-1.0)
        assert late.answered == 0
    finally:
        system.stop()


def test_the_table_compares_all_ways(artifacts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "STEPS", 1)
    monkeypatch.setattr(table, "SHARES", (0.5,))
    command.main(
        ["--table", "--mix", "paper", "--seconds", "0.1", "--artifacts", str(artifacts), "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "table.json").read_text())
    (paper_table,) = result["table"]
    names = [row["row"][0] for row in paper_table["rows"]]
    assert names == ["a", "b", "c", "d", "d"]
    assert all(row["saturated"]["pairs"] > 0 for row in paper_table["rows"])
    assert (tmp_path / "paper_p99.svg").read_text().count("<polyline") == 5


def test_overload_is_measured_with_the_limits_of_servers(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "TIMES", {1.0: 1.0, 8.0: 0.7})
    result = overload.measure(lambda _: None, artifacts, seconds=0.3)
    one, eight = result["overload"]["rows"]
    assert set(eight["outcomes"]) <= {"ok", "refused", "expired"}
    assert eight["outcomes"].get("refused", 0) > one["outcomes"].get("refused", 0)
    assert "| 8x |" in overload.table(result)


def test_host_costs_are_of_real_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SLOWER", {1: (1.0, 1.0)})
    monkeypatch.setattr(host, "LOADS", (0.5,))
    monkeypatch.setattr(host, "ROUNDS", 1)
    before = sys.getswitchinterval()
    result = host.measure(lambda _: None, seconds=0.2)
    assert [row["load"] for row in result["loads"]] == ["most", 0.5]
    assert all(row["host_us_per_batch"] > 0 and row["host_us_per_request"] > 0 for row in result["loads"])
    assert [row["seconds"] for row in result["switch_intervals"]] == [*host.INTERVALS]
    assert sys.getswitchinterval() == before
    assert host.table(result).count("\n") == 3 + 3 + len(host.INTERVALS)


def test_a_soak_tells_memory_and_stalls(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PART", 0.2)
    monkeypatch.setattr(soak, "SETTLE", 0.2)
    result = soak.measure(lambda _: None, artifacts, minutes=0.01)
    parts = result["soak"]["parts"]
    assert len(parts) >= 2
    assert all(part["rss_mib"] > 50 and set(part["outcomes"]) == {"ok"} for part in parts)
    assert "memory between" in soak.table(result)


def test_a_drawing_has_a_line_and_a_name_for_every_curve() -> None:
    svg = draw("a < b", "x", "y", {"one": [(1, 0.5), (2, 30.0)], "two & three": [(0, 1.0), (5e6, 2.0)]})
    assert svg.count("<polyline") == 2
    assert "two &amp; three" in svg
    assert "a &lt; b" in svg
    assert ">5M<" in svg


def test_stalls_are_seen() -> None:
    stalls = soak.Stalls()
    try:
        while len(stalls.late) < 5:
            pass
        late = stalls.take()
        assert late.dtype == np.float64
        assert (late >= 0).all()
    finally:
        stalls.stop()
