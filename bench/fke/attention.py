"""Attention alone: causal SiLU beside published figures, softmax SUMI beside cuDNN with a mask bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench.baselines.attention import Flash, cudnn
from bench.fke.cases import CAUSAL, CLIMBER, AttentionCase
from bench.fke.choice import chosen
from bench.fke.programs import Maker, cudnn_programs, packed, timed
from bench.fke.roofline import Point
from flame_jax.pallas_kernels.kernels import Implementation

FUSED = "fused"
PUBLISHED = dict(zip([case.name for case in CAUSAL], (281.0, 415.0, 523.0, 556.0), strict=True))
"""Useful TFLOP/s of NVIDIA recsys-examples' CUTLASS kernel on an H100: causal, batch 16, 4 heads of 128."""
SOFTMAX = [case for case in CLIMBER if len(case.extents) > 1]
"""A single request fills too little of the device to tell one kernel from another."""
REACH = 2.0
"""Times cuDNN's useful FLOP/s."""


def attention(
    only: Sequence[str],
    progress: Callable[[str], None],
    *,
    cases: Sequence[AttentionCase] = (*CAUSAL, *SOFTMAX),
    implementation: Implementation = "mosaic",
    kernel: Flash = cudnn,
) -> dict[str, Any]:
    """Rows of the table, and points of the roofline.

    Args:
        only: cases whose names hold one of these; all of them if there are none.
        kernel: in cuDNN's place, where there is no GPU.
    """
    cases = chosen(cases, only, lambda case: case.name)
    programs: dict[tuple[str, str], Maker] = {}
    for case in cases:
        programs[case.name, FUSED] = partial(packed, case, implementation)
        if case.softmax:
            programs |= {(case.name, name): made for name, made in cudnn_programs(case, kernel).items()}
    milliseconds, failed = timed(programs, progress)
    return {
        "attention": [_row(case, {n: ms for (of, n), ms in milliseconds.items() if of == case.name}) for case in cases],
        "failed": {" ".join(name): error for name, error in failed.items()},
        "points": [
            Point(f"{case.name}, {label}", "attention", name == FUSED, case.flops, case.bytes, ms)._asdict()
            for case in cases
            for name, label in ((FUSED, FUSED), ("given", "cuDNN"))
            if (ms := milliseconds.get((case.name, name)))
        ],
    }


def _row(case: AttentionCase, milliseconds: dict[str, float]) -> dict[str, Any]:
    tflops = {name: case.flops / ms / 1e9 for name, ms in milliseconds.items()}
    fused, published = tflops.get(FUSED), PUBLISHED.get(case.name)
    row: dict[str, Any] = {"case": case.name, "softmax": case.softmax, "ms": milliseconds, "tflops": tflops}
    if published:
        return row | {"published_tflops": published, "ratio": fused and fused / published}
    given, made = (tflops.get(name) for name in ("given", "made"))
    ratios = {"ratio": fused and given and fused / given, "ratio_made": fused and made and fused / made}
    return row | ratios | {"reach": REACH}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: two tables, of SiLU and of softmax."""
    lines = ["| SiLU, causal | us | useful TFLOP/s | published | ratio |", "|" + "---|" * 5]
    for row in (r for r in rows if not r["softmax"]):
        measured = f"{_number(row['ms'].get(FUSED), 1e3)} | {_number(row['tflops'].get(FUSED))}"
        published = f"{_number(row.get('published_tflops'))} | {_number(row.get('ratio'), digits=2)}"
        lines.append(f"| {row['case']} | {measured} | {published} |")
    lines += [
        "",
        "| softmax with a log bias | us | useful TFLOP/s "
        f"| cuDNN us | ratio (reach {REACH:g}) | cuDNN and making its bias us | ratio |",
        "|" + "---|" * 7,
    ]
    for row in (r for r in rows if r["softmax"]):
        cells = [_number(row["ms"].get(FUSED), 1e3), _number(row["tflops"].get(FUSED))]
        cells += [_number(row["ms"].get("given"), 1e3), _number(row["ratio"], digits=2)]
        cells += [_number(row["ms"].get("made"), 1e3), _number(row["ratio_made"], digits=2)]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None, unit: float = 1.0, digits: int = 1) -> str:
    """What failed is a dash."""
    return "-" if value is None else f"{value * unit:.{digits}f}"
