"""Planning a ladder, through the command line: figures by hand, what is printed, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_jax import plan as module
from flame_jax.config import Config
from flame_jax.fke.buckets import make_ladder
from flame_jax.fke.footprint import Footprint, Line
from flame_jax.models.cost import bucket_cost, filled_cost
from flame_jax.models.serving import served_slot
from flame_jax.packing import Bucket, Extent, fits
from flame_jax.plan import GIB, PROG, main
from tests import tiny

ALIGN = tiny.LAYOUT.align


@pytest.fixture
def settled(tmp_path: Path) -> Config:
    return dataclasses.replace(tiny.config(tmp_path), layout=tiny.LAYOUT)


def write_trace(path: Path, rows: list[tuple[int, int]], times: list[float] | None = None) -> Path:
    names = "history,candidates" + (",time" if times else "")
    lines = [",".join(map(str, [*row, *times[i : i + 1]] if times else row)) for i, row in enumerate(rows)]
    path.write_text("\n".join([names, *lines, ""]))
    return path


def planned(config: Config, folder: Path, trace: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> Any:
    file = tiny.write_config(config, folder / "config.yaml")
    capsys.readouterr()
    main(["--config", file, "--trace", str(trace), "--json", *flags])
    return json.loads(capsys.readouterr().out)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{PROG}: error: ")
    return line


def test_by_hand_one_request_at_a_time(settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 5 and 3 rows take 8 + 8; 100 events are cut to 16, and 9 candidates take 16. The largest bucket has to hold the
    # longest history beside a candidate anyway.
    trace = write_trace(tmp_path / "t.csv", [(5, 3)] * 3 + [(100, 9)])
    plan = planned(settled, tmp_path, trace, capsys, "--no-measure", "--concurrency", "1")
    assert plan["proposed"]["buckets"] == [[16, 8], [32, 16]]
    assert plan["proposed"]["batch_shares"] == [0.75, 0.25]
    assert plan["fixed"]["buckets"] == [[32, 16], [64, 32]]
    assert plan["fixed"]["batch_shares"] == [1.0, 0.0]
    small, large = (bucket_cost(settled.model, settled.schema, settled.layout, Bucket(*b)) for b in [(16, 8), (32, 16)])
    assert plan["proposed"]["padded_flops_per_request"] == pytest.approx((3 * small + large) / 4)
    assert plan["fixed"]["padded_flops_per_request"] == pytest.approx(large)
    useful = filled_cost(settled.model, settled.schema, np.array([5, 5, 5, 16]), np.array([3, 3, 3, 9])).mean()
    for ladder in (plan["fixed"], plan["proposed"]):
        assert ladder["useful_flops_per_request"] == pytest.approx(useful)
        assert ladder["waste"] == pytest.approx(ladder["padded_flops_per_request"] / useful - 1)
        assert ladder["memory_bytes"] is None
    assert plan["measured"] is None


def test_interleaved_events_take_two_rows(settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = dataclasses.replace(settled.schema, interleave=True)
    export = dataclasses.replace(settled.export, buckets=((64, 16),))
    config = dataclasses.replace(settled, schema=schema, export=export)
    trace = write_trace(tmp_path / "t.csv", [(9, 1), (99, 1)])
    plan = planned(config, tmp_path, trace, capsys, "--no-measure", "--concurrency", "1")
    assert plan["proposed"]["buckets"] == [[32, 8], [40, 8]]


def test_requests_that_arrive_together_share_batches(
    settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first two come within 5 ms, the last one later; rows are in any order.
    trace = write_trace(tmp_path / "t.csv", [(8, 8), (16, 8), (8, 8)], [7.0, 3.0, 3.004])
    plan = planned(settled, tmp_path, trace, capsys, "--no-measure", "--batch-ms", "5")
    assert plan["proposed"]["buckets"] == [[16, 8], [40, 16]]
    assert plan["proposed"]["batch_shares"] == [0.5, 0.5]
    assert "3 that come within 5 ms" in plan["traffic"]


REQUESTS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 90)), min_size=1, max_size=30)


@settings(max_examples=25)
@given(REQUESTS, st.integers(1, 6), st.sampled_from(["1", "4", "1,3,7"]))
def test_a_proposal_is_a_legal_ladder_no_worse_than_the_configured_one_and_holds_every_batch(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, int]], most: int, concurrency: str
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    config = dataclasses.replace(tiny.config(folder), layout=tiny.LAYOUT)
    trace = write_trace(folder / "t.csv", requests)
    args, _ = module.parse(
        ["--trace", str(trace), "--no-measure", "--max-buckets", str(most), "--concurrency", concurrency]
    )
    plan = module.make_plan(args, config)
    proposed = plan.proposed.ladder
    assert make_ladder(proposed, config.schema, config.layout) == proposed
    assert len(proposed) <= most
    if most >= len(plan.fixed.ladder):
        assert plan.proposed.padded <= plan.fixed.padded * (1 + 1e-9)
    assert plan.proposed.padded >= plan.useful
    largest = plan.fixed.ladder[-1]
    for history, candidates in requests:
        piece = Extent(min(history, 16), min(candidates, largest.candidates, largest.tokens - 16))
        assert any(fits([piece], bucket, config.layout) for bucket in proposed)


ROWS = [(5, 3), (16, 9), (12, 30), (3, 17), (9, 8), (1, 1), (14, 24), (16, 32)] * 4


@pytest.fixture
def known_footprint(monkeypatch: pytest.MonkeyPatch) -> Footprint:
    """Stands for compiling: 1000 bytes of temporaries and 10 of code for each row, 2 s to build a bucket."""
    footprint = Footprint("abacus", 41, (Bucket(16, 8),), Line(0, 1000), Line(0, 10), Line(2, 0))
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: footprint)
    return footprint


@pytest.mark.usefixtures("known_footprint")
def test_memory_and_build_time_are_summed_as_they_are_used(
    settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(settled, tmp_path, write_trace(tmp_path / "t.csv", ROWS), capsys)
    for ladder in (plan["fixed"], plan["proposed"]):
        buckets = [Bucket(*pair) for pair in ladder["buckets"]]
        slots = [4 * served_slot(settled.model, settled.schema, settled.layout, bucket).words for bucket in buckets]
        code, running = sum(10 * b.tokens for b in buckets), 1000 * max(b.tokens for b in buckets)
        # Two executors: a slot of each on the host and on the device, and both may run at once.
        assert ladder["memory_bytes"] == pytest.approx(2 * 2 * sum(slots) + code + 2 * running)
        assert ladder["build_seconds"] == 2 * len(buckets)
    assert plan["measured"]["device_kind"] == "abacus"


@pytest.mark.usefixtures("known_footprint")
def test_budgets_are_kept_at_the_cost_of_flops(
    settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "t.csv", ROWS)
    free = planned(settled, tmp_path, trace, capsys)["proposed"]
    quick = planned(settled, tmp_path, trace, capsys, "--build-seconds", "4.5")["proposed"]
    assert len(quick["buckets"]) == 2 < len(free["buckets"])
    assert quick["padded_flops_per_request"] > free["padded_flops_per_request"]
    # Less than the largest bucket takes alone, so that the requests go in smaller batches.
    limit = 120_000
    small = planned(settled, tmp_path, trace, capsys, "--memory-gib", str(limit / GIB))["proposed"]
    assert small["memory_bytes"] <= limit < free["memory_bytes"]
    assert small["buckets"][-1][0] < free["buckets"][-1][0]
    line = refusal(["--config", str(tmp_path / "config.yaml"), "--trace", str(trace), "--memory-gib", "1e-6"], capsys)
    assert "--memory-gib" in line
    assert "t24_c8" in line


def test_the_figures_that_are_printed_are_measured_here_and_the_lines_can_be_pasted(
    settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.write_config(settled, tmp_path / "config.yaml")
    trace = write_trace(tmp_path / "t.csv", ROWS)
    main(["--trace", str(trace), "--config", file, "--vocabulary-rows", "41", "--max-buckets", "3"])
    printed = capsys.readouterr().out
    assert f"measured on this machine's {tiny.device().device_kind} by compiling t16_c8, t40_c24, t64_c32" in printed
    rows = {line[:26].strip(): line[26:].split() for line in printed.splitlines()}
    assert [float(x) > 0 for x in rows["build time, s"]] == [True, True]
    assert [float(x) > 0 for x in rows["memory, GiB"]] == [True, True]
    assert rows["buckets"] == ["2", "3"]
    pasted = yaml.safe_load(printed[printed.index("\nexport:") :])
    ladder = make_ladder(pasted["export"]["buckets"], settled.schema, settled.layout)
    assert len(ladder) == 3
    # Planned again from what was pasted, nothing is left to gain.
    again = planned(
        settled,
        tmp_path,
        trace,
        capsys,
        "--no-measure",
        "--max-buckets",
        "3",
        f"--export.buckets={list(map(list, ladder))}",
    )
    assert again["proposed"]["padded_flops_per_request"] == pytest.approx(again["fixed"]["padded_flops_per_request"])


def test_a_checkpoint_gives_the_vocabulary_and_must_be_of_the_model(
    settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    def measure(model: object, schema: object, layout: object, buckets: object, vocabulary: int, **_: object) -> object:
        rows.append(vocabulary)
        return Footprint("abacus", vocabulary, (Bucket(16, 8),), Line(0, 1), Line(0, 1), Line(1, 0))

    monkeypatch.setattr(module, "measure", measure)
    tiny.save_checkpoint(tmp_path / "checkpoint", 1)
    trace = write_trace(tmp_path / "t.csv", ROWS)
    folder = str(tmp_path / "checkpoint")
    planned(settled, tmp_path, trace, capsys, "--checkpoint", folder)
    planned(settled, tmp_path, trace, capsys)
    assert rows == [tiny.ITEMS + 1, 100_000]
    argv = ["--config", str(tmp_path / "config.yaml"), "--trace", str(trace), "--checkpoint", folder]
    assert "model.width" in refusal([*argv, "--model.width", "32"], capsys)
    assert "nowhere" in refusal([*argv[:-1], str(tmp_path / "nowhere")], capsys)


def test_a_device_that_cannot_compile_ends_with_one_line(
    settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise RuntimeError("no such\nbackend")

    monkeypatch.setattr(module, "measure", measure)
    trace = write_trace(tmp_path / "t.csv", ROWS)
    line = refusal(["--config", tiny.write_config(settled, tmp_path / "c.yaml"), "--trace", str(trace)], capsys)
    assert "no such backend" in line
    assert "--no-measure" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--trace"),
        (["--trace"], "--trace"),
        (["--trace", "t.csv", "--no-measure", "--memory-gib", "1"], "--memory-gib"),
        (["--trace", "t.csv", "--no-measure", "--build-seconds", "1"], "--build-seconds"),
        (["--trace", "t.csv", "--no-measure", "--checkpoint", "x"], "--checkpoint"),
        (["--trace", "t.csv", "--vocabulary-rows", "5", "--checkpoint", "x"], "--checkpoint"),
        (["--trace", "t.csv", "--batch-ms", "5", "--concurrency", "4"], "--concurrency"),
        (["--trace", "t.csv", "--batch-ms", "0"], "'0' is not a positive number"),
        (["--trace", "t.csv", "--memory-gib", "nan"], "'nan' is not a positive number"),
        (["--trace", "t.csv", "--memory-gib", "lots"], "'lots' is not a positive number"),
        (["--trace", "t.csv", "--max-buckets", "0"], "'0' is not a whole number"),
        (["--trace", "t.csv", "--concurrency", "1,,4"], "'' is not a whole number"),
        (["--trace", "t.csv", "--max-bucket", "3"], "--max-bucket"),
        (["--trace", "t.csv", "--model.width", "no"], "model.width"),
    ],
    ids=str,
)
def test_wrong_flags_end_with_one_line_and_status_2(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(flags, capsys, status=2)


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        ([(5, 3), (5, 0)], [], "line 3: candidates is '0'"),
        ([(5, 4097)], [], "not a whole number in [1, 4096]"),
        ([], [], "holds no requests"),
        ([(5, 3)], ["--batch-ms", "5"], "needs a column time"),
        ([(5, 3)], ["--export.buckets", "[[16, 8]]"], "cannot hold schema.block_length"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_ends_with_one_line(
    rows: list[tuple[int, int]],
    flags: list[str],
    said: str,
    settled: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace = write_trace(tmp_path / "t.csv", rows)
    file = tiny.write_config(settled, tmp_path / "config.yaml")
    argv = ["--config", file, "--trace", str(trace), "--no-measure", *flags]
    assert said in refusal(argv, capsys)


def test_a_missing_trace_ends_with_one_line(
    settled: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.write_config(settled, tmp_path / "config.yaml")
    assert "gone.csv" in refusal(["--config", file, "--trace", str(tmp_path / "gone.csv"), "--no-measure"], capsys)


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--build-seconds" in capsys.readouterr().out
