"""The benchmarks of the fused kernels, small and on the CPU: what they compute and count, not how fast it is."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.baselines.attention import FlashMasked, SplitSoftmax, xla
from bench.baselines.inputs import Run, packed_run
from bench.baselines.runs import jax_runs
from bench.fke import __main__ as command
from bench.fke import (
    ablation,
    attention,
    check,
    check_stack,
    forward,
    mixed,
    passes,
    profile,
    programs,
    roofline,
    tune,
)
from bench.fke.cases import CAUSAL, AttentionCase
from bench.fke.choice import UnknownChoice, chosen, named
from bench.threads import together
from bench.timing import side_by_side
from flame_jax.fke.compile import CompileCounter
from flame_jax.packing import Bucket, Extent
from flame_jax.pallas_kernels.kernels import REFERENCE, Kernels
from flame_jax.pallas_kernels.layer_stack.api import layer_stack
from flame_jax.pallas_kernels.sumi_attention.api import sumi_attention
from flame_jax.pallas_kernels.sumi_attention.types import Bias, LogBias, TableBias
from tests.bench.test_baselines import inputs

SILU = AttentionCase("silu", 1, 2, 16, softmax=False, extents=(Extent(20, 1),) * 2, align=16)
SOFTMAX = AttentionCase("softmax", 2, 2, 16, softmax=True, extents=(Extent(20, 9),) * 3, align=16)
BASE = "climber_base.yaml"
EFFORT = ablation.Effort(calls=3, rounds=1, seconds=0.001)


def result(program: programs.Program) -> np.ndarray:
    return np.asarray(jax.jit(program.function)(*program.operands), np.float32)


@cache
def packed_once() -> Run:
    """The engine's program, compiled once: on the CPU there is no other."""
    run = packed_run(inputs(BASE))
    run.compile()
    return run


@cache
def baselines_once() -> dict[str, Run]:
    return jax_runs(inputs(BASE))


def baselines(*_: Any) -> dict[str, Run]:
    return baselines_once()


def packed(*_: Any) -> Run:
    return packed_once()


# Attention alone


@cache
def packed_attention() -> np.ndarray:
    return result(programs.packed(SOFTMAX, "xla", calls=1))


@pytest.mark.parametrize(
    "make",
    [
        partial(programs.biased, SOFTMAX, SplitSoftmax()),
        partial(programs.biased, SOFTMAX, FlashMasked(xla)),
        partial(programs.bias_given, SOFTMAX, xla),
    ],
    ids=["split", "cudnn makes its bias", "cudnn is given its bias"],
)
def test_baselines_compute_what_the_packed_kernel_does(make: Callable[..., programs.Program]) -> None:
    expected = packed_attention()[:, programs.regular(SOFTMAX, every_key=False).rows]
    assert expected.std() > 0.1
    np.testing.assert_allclose(result(make(calls=1)).reshape(expected.shape), expected, atol=0.05)


def test_useful_work_is_counted_pair_by_pair() -> None:
    pairs = sum(range(1, 21)) + 21  # each history row up to itself; the candidate all of them and itself
    assert SILU.flops == 2 * pairs * 4 * 2 * 16
    assert SOFTMAX.flops == 2 * 3 * (20 * 20 + 9 * 21) * 4 * 2 * 16
    assert SILU.bytes == 2 * 21 * 2 * 16 * 2 * 4  # q, k, v and the result in bfloat16
    assert SOFTMAX.bytes == 2 * 3 * 29 * (2 * 16 * 2 * 4 + 4)


def test_attention_alone_has_a_row_and_points_for_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "packed", partial(programs.packed, calls=1))
    found = attention.attention([], print, cases=(SILU, SOFTMAX), implementation="xla", kernel=xla)
    assert [row["case"] for row in found["attention"]] == ["silu", "softmax"]
    assert not found["failed"]
    assert [point["name"] for point in found["points"]] == ["silu, fused", "softmax, fused", "softmax, cuDNN"]
    ours, theirs = (found["attention"][1]["ms"][name] for name in ("fused", "given"))
    assert found["attention"][1]["ratio"] == pytest.approx(theirs / ours)
    assert "| softmax |" in attention.table(found["attention"])


def test_what_fails_is_a_dash() -> None:
    row = attention._row(CAUSAL[0], {})
    assert "| - | - | 281.0 | - |" in attention.table([row])


# Mixed lengths


def test_waste_is_what_counting_gives() -> None:
    extents = mixed.draw(32, np.random.default_rng(3))
    assert all(64 <= n <= 1024 and 16 <= c <= 512 for n, c in extents)
    case, useful, aligned, candidates = mixed.climber(extents, 16), 0, 0, 0
    for n, c in extents:
        useful += n + c
        aligned += n + -n % 16 + c + -c % 16
        candidates += c + -c % 16
    bucket = mixed.fitting(case)
    assert bucket == (math.ceil(aligned / 1024) * 1024, math.ceil(candidates / 1024) * 1024)
    assert mixed.waste(case) == (useful, aligned, bucket.tokens)
    assert mixed.waste(case).alignment == pytest.approx((aligned - useful) / useful)
    assert mixed.waste(case).total == pytest.approx((bucket.tokens - useful) / useful)


def test_random_batches_keep_the_limits() -> None:
    spread = mixed.spread(mixed.REQUESTS, 16, 300)
    assert all(spread[name]["mean"] < limit for name, limit in mixed.LIMITS.items())
    assert spread["total"]["p99"] < mixed.LIMITS["total"]


def test_padded_requests_hold_what_packed_ones_do() -> None:
    extents = (Extent(20, 9), Extent(7, 30))
    program = programs.packed(mixed.climber((Extent(64, 64),) * 2, 64), "xla", held=extents)
    rows = np.asarray(program.operands[0][3])
    assert rows[:2, [0, 1, 2, 5, 6]].tolist() == [[0, 192, 9, 20, 20], [64, 128, 30, 7, 7]]


def test_mixed_lengths_have_a_row_for_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(makers: dict[str, programs.Maker], _: Any) -> Any:
        made = {name: make() for name, make in makers.items()}
        sizes.update({name: jax.eval_shape(p.function, *p.operands).size for name, p in made.items()})
        return dict.fromkeys(made, 1.0), {}

    sizes: dict[str, int] = {}
    monkeypatch.setattr(mixed, "timed", ran)
    monkeypatch.setattr(mixed, "STEP", 64)
    found = mixed.mixed(
        print, extents=(Extent(20, 9),), largest=Extent(64, 64), implementation="xla", kernel=xla, draws=2
    )
    assert {row["form"]: row["rows"] for row in found["mixed"]} == {n: s // (2 * 2 * 64) for n, s in sizes.items()}
    assert len(sizes) == 7
    assert found["mixed"][0]["ratio"] == 1
    assert "| padded, its tiles skipped | 128 |" in mixed.table(found)


# The ablation


def test_the_ablation_has_every_row_and_scores_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    one, said = inputs(BASE), list[str]()
    monkeypatch.setattr(passes, "packed_run", packed)
    monkeypatch.setattr(ablation, "jax_runs", baselines)
    runs = ablation.offered(one, ["dense_masked"], jax.devices()[0], said.append)
    passes.compile_together(runs.values())
    measured = ablation.measure(runs, one, EFFORT, said.append)
    assert measured["rows"].keys() == {"fused", "reference", "dense_masked"} == measured["apart"].keys()
    assert max(measured["apart"].values()) < 1e-3
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in measured["rows"].values())
    assert {row["calls"] for row in measured["rows"].values()} == {7}  # a call a round at least
    assert not measured["failed"]


def test_the_fused_row_is_compared_with_the_fastest_of_each_kind() -> None:
    rows = {
        name: {"ms": ms, "mean_ms": 2 * ms, "p99_ms": 3 * ms, "pairs_per_second": 8 / ms}
        for name, ms in {"eager_dense": 8.0, "eager_sdpa": 6.0, "graph_flex": 1.5, "cudnn": 4.0, "fused": 2.0}.items()
    }
    found = ablation.summary(rows)
    assert found["best"] == {"eager": "eager_sdpa", "jit": "cudnn", "fused": "fused"}
    assert (found["ratio"], found["ratio_over_jit"], found["latency_ratio"]) == (3.0, 2.0, 3.0)
    table = ablation.table([ablation.CASES[0]._asdict() | found | {"rows": rows}])
    assert "| **eager_sdpa** | 0.0k | 12.00 | 18.00 | 3.00 x |" in table
    assert "3.00 times eager PyTorch's throughput (the paper's ratio: 4.7)" in table
    without = ablation.summary({name: row for name, row in rows.items() if not name.startswith("eager")})
    assert without["ratio"] is None


def test_a_failing_baseline_is_left_out_and_a_failing_kernel_is_not() -> None:
    said, one = list[str](), packed()
    bad = one._replace(launch=lambda: 1 // 0)
    scores, failed = passes.first({"fused": one, "reference": one, "dense_masked": bad}, said.append)
    assert scores.keys() == {"fused", "reference"}
    assert said == [f"dense_masked failed: {failed['dense_masked']}"]
    with pytest.raises(RuntimeError, match="fused: ZeroDivisionError"):
        passes.first({"fused": bad, "reference": one}, said.append)


def test_least_bytes_are_weights_rows_slot_and_scores() -> None:
    one = inputs(BASE)  # float32: 3 requests of two blocks of 21 rows and 5 candidates
    weights = sum(w.size for name, w in one.weights.items() if name not in ("item", "item_bias"))
    tasks = len(one.config.schema.tasks)
    rows = 2 * 3 * 26 * 16 + 3 * 5 * tasks
    assert passes.least_bytes(one) == 4 * (weights + rows + one.words.size + 3 * 5 * tasks)


# Forward passes


def test_forward_passes_take_the_named_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "batch", lambda config, *_: inputs(f"{config}.yaml"))
    monkeypatch.setattr(passes, "packed_run", packed)
    monkeypatch.setattr(forward, "jax_runs", baselines)
    monkeypatch.setattr(passes, "side_by_side", lambda runs, rounds, seconds, wait: side_by_side(runs, 1, 0.001, wait))
    cases, said = [forward.Case("climber_base", 3, 21, 5, 2.0), forward.Case("hstu_dlrmv3", 3, 21, 5, 1.0)], list[str]()
    found = forward.forward([], ["dense_masked"], jax.devices()[0], said.append, cases)
    assert said[0] == "hstu_dlrmv3 B=3: left out, its model has none of these baselines"
    assert found["forward"][0]["ms"].keys() == {"fused", "reference", "dense_masked"}
    assert found["forward"][0]["best_baseline"] == "dense_masked"
    assert [point["fused"] for point in found["points"]] == [True, False]
    assert "| climber_base B=3 (21 a block + 5) |" in forward.table(found["forward"])


def test_compiling_ahead_is_what_launching_uses() -> None:
    run = baselines()["dense_masked"]
    run.compile()
    counter = CompileCounter()
    run.wait(run.launch())
    assert counter.count == 0


# The roofline


def points() -> list[roofline.Point]:
    return [
        roofline.Point("causal <SiLU>", "attention", True, 1e12, 1e9, 2.0),
        roofline.Point("cuDNN", "attention", False, 1e12, 1e9, 4.0),
        roofline.Point("base", "forward", True, 1e11, 1e7, 0.5),
    ]


def test_the_roofline_is_xml_with_a_point_per_kernel() -> None:
    root = ElementTree.fromstring(roofline.svg(points()))
    space = {"svg": "http://www.w3.org/2000/svg"}
    marks = root.findall(".//svg:g[@class='point']", space)
    titles = [mark.findtext("svg:title", namespaces=space) for mark in marks]
    assert titles == [
        "causal <SiLU>: 500 TFLOP/s, 1000 FLOPs a byte",
        "cuDNN: 250 TFLOP/s, 1000 FLOPs a byte",
        "base: 200 TFLOP/s, 10000 FLOPs a byte",
    ]
    assert "prefers-color-scheme: dark" in str(root.findtext("svg:style", namespaces=space))
    labels = [text.text for text in root.findall(".//svg:text", space)]
    assert {"100", "1,000", "useful TFLOP/s", "3 base: 200 TFLOP/s"} <= set(labels)


def test_an_axis_is_logarithmic_and_holds_its_values() -> None:
    axis = roofline.axis([3.0, 250.0], 0, 300)
    assert (axis.first, axis.last) == (0, 3)
    assert [axis.at(value) for value in (1, 10, 100, 1000)] == [0, 100, 200, 300]
    assert [value for value, labelled in axis.ticks() if labelled] == [1, 10, 100, 1000]


# The command line


def test_plotting_reads_every_result(tmp_path: Path) -> None:
    for name, own in (("attention", points()[:2]), ("forward", points()[2:])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"points": [p._asdict() for p in own]}))
    (tmp_path / "check.json").write_text(json.dumps({"checks": 1}))
    command.main(["--plot", str(tmp_path)])
    assert (tmp_path / "roofline.svg").read_text().count('<g class="point">') == 3


def test_plotting_nothing_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run --attention"):
        roofline.read(tmp_path)


@pytest.mark.parametrize("mode", [*command.MODES, ""])
def test_every_mode_writes_its_result(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(args: Any) -> command.Outcome:
        seen.append((args.only, args.baselines))
        return {"found": 1}, mode == "check"

    name = mode or "forward"
    monkeypatch.setitem(command.MODES, name, command.Mode("", run, command.CHOICES))
    arguments = [f"--{mode}"] * bool(mode) + [
        "--only",
        "a,b",
        "--only",
        "c",
        "--baselines",
        "d",
        "--out",
        str(tmp_path),
    ]
    try:
        command.main(arguments)
    except SystemExit as left:
        assert (mode, left.code) == ("check", 1)
    assert seen == [(["a", "b", "c"], ["d"])]
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert saved["found"] == 1
    assert saved["command"] == f"python -m bench.fke --{name} --only a,b,c --baselines d --out DIR"


def test_unknown_names_are_refused_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownChoice, match="there is climber_base, climber_long"):
        chosen(ablation.CASES, ["hstu"], lambda case: case.config)
    with pytest.raises(UnknownChoice, match="there is a, b"):
        named({"a": 1, "b": 2}, ["c"])
    with pytest.raises(SystemExit):
        command.main(["--attention", "--only", "nothing"])
    assert "no case holds nothing in its name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--mixed", "--only", "padded"])
    assert "--mixed takes no --only" in capsys.readouterr().err


def test_tuning_leaves_out_what_is_wrong_or_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tiling: SimpleNamespace, x: jax.Array) -> jax.Array:
        return x @ x if tiling.stages == 3 else x + 0.01 * tiling.stages**3

    tilings, said = [SimpleNamespace(stages=stages) for stages in (9, 1, 0, 3)], list[str]()
    shape = tune.Shape("op", "case", {"width": 1}, tune.SMALL + 1, tilings, run, [jax.numpy.zeros((2, 3))])
    monkeypatch.setattr(tune, "OPERATIONS", {"op": [lambda: shape], "other": []})
    with ThreadPoolExecutor(1) as threads:
        (row,) = tune.tune(said.append, ["op"], threads)
    assert row.microseconds.keys() == {"namespace(stages=0)", "namespace(stages=1)"}
    assert row.tiling["stages"] in (0, 1)
    assert len(said) == 3
    assert "namespace(stages=3) does not compile" in said[0]
    assert "namespace(stages=9) is 7." in said[1]
    assert said[2].startswith("op case: namespace(stages=")


def test_tuning_one_operation_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned" / "h100.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"entries": {"a": [1], "b": [2]}}))
    row = tune.Row("b", "", {"width": 1}, 64, {"t": 1.0}, {"stages": 2})
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(tune, "tune", lambda *_: [row])
    command.main(["--tune", "--only", "b"])
    entry = {"shape": {"width": 1}, "rows": 64, "tiling": {"stages": 2}}
    assert json.loads(file.read_text())["entries"] == {"a": [1], "b": [entry]}
    command.main(["--tune"])
    assert json.loads(file.read_text())["entries"] == {"b": [entry]}


def test_tasks_that_fail_do_not_stop_others() -> None:
    made, failed = together({"good": lambda: 3, "bad": lambda: 1 // 0})
    assert made == {"good": 3}
    assert failed == {"bad": "ZeroDivisionError: integer division or modulo by zero"}


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("form", [check.TRITON[0], check.TRITON[-1]], ids=lambda form: str(form.name))
def test_the_check_of_attention_tells_right_from_wrong(
    form: check.Attention, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict[str, bool]()
    monkeypatch.setattr(check, "BUCKET", Bucket(768, 256))
    monkeypatch.setattr(check, "tables", lambda _: [("three", [Extent(150, 3), Extent(0, 1), Extent(7, 80)])])

    def kernel(*arrays: jax.Array, history: None, bias: Bias | None, **settings: Any) -> jax.Array:
        if not right and isinstance(bias, LogBias):
            bias = LogBias(1.5 * bias.coefficients)
        elif not right and isinstance(bias, TableBias):
            bias = TableBias(bias.position, jnp.roll(bias.time, 1))
        return sumi_attention(*arrays, bias=bias, window=256, **settings)

    module = "flame_jax.pallas_kernels.sumi_attention.triton"
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(sumi_attention=kernel))
    check._check_attention(form, "attention", found.__setitem__, np.random.default_rng(0))
    assert {name.rsplit(":", 1)[0]: good for name, good in found.items()} == {
        "attention: three": right,
        "attention: alone": right,
        "attention: among others": right,
        "attention": True,
    }


@pytest.mark.parametrize("right", [True, False])
def test_the_check_of_the_layer_stack_tells_right_from_wrong(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, found = check_stack.OURS, dict[str, bool]()
    monkeypatch.setattr(check_stack, "DEPTH", 2)
    monkeypatch.setattr(check_stack, "BUCKET", Bucket(640, 192))
    monkeypatch.setattr(check_stack, "BATCHES", {"alone": [ours], "among others": [Extent(64, 9), ours]})

    def kernel(*args: Any, kernels: Kernels = REFERENCE, **changed: Any) -> tuple[jax.Array, ...]:
        found = layer_stack(*args, **changed)
        return found if kernels == REFERENCE else tuple(jnp.nan_to_num(y) + (0.0 if right else 0.2) for y in found)

    monkeypatch.setattr(check_stack, "layer_stack", kernel)
    random = np.random.default_rng(0)
    check_stack.check_stack("stack", found.__setitem__, random, check._report_apart, runs=1)
    distances = [good for name, good in found.items() if "equal" not in name]
    assert distances == [right, right]
    assert all(good for name, good in found.items() if "equal" in name)


def test_a_profile_adds_up_the_kernels_of_the_device() -> None:
    def line(name: str, *events: tuple[str, float]) -> SimpleNamespace:
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=n, duration_ns=1e3 * us) for n, us in events])

    stream = line("Stream #14(Compute)", *[("fusion", 2.0), ("a_mosaic_gpu_kernel", 5.0)] * profile.PASSES)
    gpu = SimpleNamespace(name="/device:GPU:0", lines=[stream, line("XLA Ops", ("fusion", 9.0))])
    rows = profile.kernels([SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("copy", 1.0))]), gpu])
    assert rows == [
        {"name": "a_mosaic_gpu_kernel", "calls": 1.0, "us": 5.0},
        {"name": "fusion", "calls": 1.0, "us": 2.0},
    ]
    assert "| c | 1, 5.0 | 1, 2.0 | fusion 2.0 |" in profile.table([{"case": "c", "kernels": rows}])
