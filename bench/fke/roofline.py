"""Useful TFLOP/s over arithmetic intensity under the H100's roof: an SVG that is readable on light and dark pages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

PEAK, MATMUL, BANDWIDTH = 989.0, 803.0, 3.35
"""TFLOP/s of an H100's bf16 tensor cores by datasheet and as measured of a large product; TB/s of its memory."""
WIDTH, ROW, TOP, BOTTOM = 1000, 17, 40, 60
LEFT, RIGHT, LEGEND = 70, 620, 640
"""Pixels."""


class Point(NamedTuple):
    """Something measured.

    Attributes:
        family: `attention` or `forward`.
        fused: a kernel of ours, not a baseline.
        flops: useful ones.
        bytes: that have to move at least.
        milliseconds: of one call.
    """

    name: str
    family: str
    fused: bool
    flops: float
    bytes: float
    milliseconds: float

    @property
    def tflops(self) -> float:
        """Useful TFLOP/s."""
        return self.flops / self.milliseconds / 1e9

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes


class Axis(NamedTuple):
    """A logarithmic axis from 10^first to 10^last between two pixels."""

    first: int
    last: int
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value."""
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> Iterator[tuple[float, bool]]:
        """Values with a line, and whether it is labelled."""
        for power in range(self.first, self.last):
            yield from ((digit * 10.0**power, digit == 1) for digit in range(1, 10))
        yield 10.0**self.last, True


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Whole decades around the values."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return Axis(first, max(last, first + 1), start, end)


def read(folder: Path) -> list[Point]:
    """The points of every result file in a folder.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.glob("*.json"))
    points = [Point(**point) for file in files for point in json.loads(file.read_text()).get("points", [])]
    if not points:
        raise ValueError(
            f"no result file in {folder} has points: run --attention, --mixed, --ablation, --forward or --stack first"
        )
    return points


def svg(points: Sequence[Point]) -> str:
    """The plot: a number per point, and a legend."""
    points = sorted(points, key=lambda p: (p.family, not p.fused, p.name))
    bottom = TOP + max(400, ROW * (len(points) + 6))
    x = axis([PEAK / BANDWIDTH, *(p.intensity for p in points)], LEFT, RIGHT)
    y = axis([PEAK, *(p.tflops for p in points)], bottom, TOP)
    height = bottom + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        "<title>Roofline of the kernels and forward passes on an H100</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        *_grid(x, y),
        *_roof(x, y),
        *(_mark(number, point, x, y) for number, point in enumerate(points, 1)),
        *_legend(points),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


_STYLE = """
.page { fill: #ffffff } text { fill: #24292f; font: 12px sans-serif } .small { font-size: 10px }
.grid { stroke: #d0d7de; stroke-width: 0.5 } .decade { stroke: #8c959f; stroke-width: 0.8 }
.roof { stroke: #24292f; stroke-width: 2; fill: none } .measured { stroke: #24292f; stroke-dasharray: 6 4; fill: none }
.attention { stroke: #0969da } .forward { stroke: #bc4c00 }
.attention.fused { fill: #0969da } .forward.fused { fill: #bc4c00 } .baseline { fill: none; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117 } text { fill: #e6edf3 }
  .grid { stroke: #21262d } .decade { stroke: #484f58 } .roof, .measured { stroke: #e6edf3 }
  .attention { stroke: #58a6ff } .forward { stroke: #f0883e }
  .attention.fused { fill: #58a6ff } .forward.fused { fill: #f0883e }
}
"""


def _text(x: float, y: float, words: str, *, anchor: str = "start", small: bool = False, turned: bool = False) -> str:
    style = ' class="small"' if small else ""
    turn = f' transform="rotate(-90 {x} {y})"' if turned else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{style}{turn}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    """Lines, and labels of whole decades."""
    for value, labelled in x.ticks():
        yield _line(x.at(value), y.start, x.at(value), y.end, "decade" if labelled else "grid")
        if labelled:
            yield _text(x.at(value), y.start + 18, f"{value:,g}", anchor="middle")
    for value, labelled in y.ticks():
        yield _line(x.start, y.at(value), x.end, y.at(value), "decade" if labelled else "grid")
        if labelled:
            yield _text(x.start - 8, y.at(value) + 4, f"{value:,g}", anchor="end")
    middle = (x.start + x.end) / 2, (y.start + y.end) / 2
    yield _text(middle[0], y.start + 42, "useful FLOPs / byte that has to move", anchor="middle")
    yield _text(x.start - 48, middle[1], "useful TFLOP/s", anchor="middle", turned=True)


def _roof(x: Axis, y: Axis) -> Iterator[str]:
    """Bandwidth, then the tensor cores' peak; dashed what a large matrix product reaches."""
    left, right = 10.0**x.first, 10.0**x.last
    start = max(left, 10.0**y.first / BANDWIDTH)
    corners = [(start, start * BANDWIDTH), (PEAK / BANDWIDTH, PEAK), (right, PEAK)]
    path = " ".join(f"{x.at(a)},{y.at(b)}" for a, b in corners)
    yield f'<polyline class="roof" points="{path}"/>'
    yield _line(x.at(MATMUL / BANDWIDTH), y.at(MATMUL), x.at(right), y.at(MATMUL), "measured")


def _shape(point: Point, x: float, y: float) -> str:
    """A circle for an attention, a square for a forward pass; filled if it is ours."""
    style = f"{point.family} {'fused' if point.fused else 'baseline'}"
    if point.family == "forward":
        return f'<rect class="{style}" x="{x - 4}" y="{y - 4}" width="8" height="8"/>'
    return f'<circle class="{style}" cx="{x}" cy="{y}" r="4.5"/>'


def _mark(number: int, point: Point, x: Axis, y: Axis) -> str:
    at = x.at(point.intensity), y.at(point.tflops)
    told = escape(f"{point.name}: {point.tflops:.0f} TFLOP/s, {point.intensity:.0f} FLOPs a byte")
    label = _text(at[0] + 6, at[1] - 5, str(number), small=True)
    return f'<g class="point"><title>{told}</title>{_shape(point, *at)}{label}</g>'


def _legend(points: Sequence[Point]) -> Iterator[str]:
    lines = (
        f"roof: {BANDWIDTH:g} TB/s and {PEAK:g} TFLOP/s; dashed: {MATMUL:g}, a large matrix product",
        "circles: attention alone; squares: whole forward passes",
        "filled: fused kernels; hollow: the baseline beside them",
    )
    for number, line in enumerate(lines):
        yield _text(LEGEND, TOP + ROW * number, line, small=True)
    for number, point in enumerate(points, 1):
        y = TOP + ROW * (number + len(lines))
        yield _shape(point, LEGEND + 5, y - 4)
        yield _text(LEGEND + 16, y, f"{number} {point.name}: {point.tflops:.0f} TFLOP/s", small=True)
