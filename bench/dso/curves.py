"""Latency over load as an SVG that is readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 70, 620, 40, 360
COLOURS = ("#d1495b", "#2e86ab", "#3f9b5f", "#c98a1b", "#7a5ea8", "#6b7280", "#0f766e", "#b45309")

Curve = Sequence[tuple[float, float]]


def draw(title: str, x_label: str, y_label: str, curves: Mapping[str, Curve]) -> str:
    """Curves on a linear and a logarithmic axis.

    Args:
        curves: by name, points (x, y) with y above 0.
    """
    points = [point for curve in curves.values() for point in curve]
    most = max(x for x, _ in points)
    low = math.floor(math.log10(min(y for _, y in points)))
    high = max(low + 1, math.ceil(math.log10(max(y for _, y in points))))

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(y) - low) / (high - low)
        return round(LEFT + (RIGHT - LEFT) * x / most, 1), round(BOTTOM - (BOTTOM - TOP) * share, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        "<style>text{fill:#6b7280}</style>",
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 15}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="16" y="{(TOP + BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(TOP + BOTTOM) / 2})">{escape(y_label)}</text>',
    ]
    for power in range(low, high + 1):
        y = at(0, 10.0**power)[1]
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}" stroke="#6b7280" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for step in range(6):
        x = at(most * step / 5, 10.0**low)[0]
        parts.append(f'<text x="{x}" y="{BOTTOM + 18}" text-anchor="middle">{_short(most * step / 5)}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour, line = COLOURS[number % len(COLOURS)], " ".join("{},{}".format(*at(*point)) for point in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += ['<circle cx="{}" cy="{}" r="2.5" fill="{}"/>'.format(*at(*point), colour) for point in curve]
        y = TOP + 14 + 20 * number
        parts.append(f'<rect x="{RIGHT + 20}" y="{y - 9}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{RIGHT + 38}" y="{y + 1}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
