"""Bars as SVG: a panel per quantity, a group of bars per case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LABELS, BAR, GAP, TOP = 900, 330, 18, 14, 30

_STYLE = """
.page { fill: #ffffff } text { fill: #24292f; font: 12px sans-serif } .title { font-weight: bold }
.bar { fill: #0969da } .first { fill: #8c959f }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117 } text { fill: #e6edf3 } .bar { fill: #58a6ff } .first { fill: #6e7681 }
}
"""


class Panel(NamedTuple):
    """One quantity; `groups` has values by group and name, the first name of each being what others stand beside."""

    title: str
    groups: Mapping[str, Mapping[str, float]]


def svg(panels: Sequence[Panel]) -> str:
    """The drawing; a value is written behind its bar."""
    parts, y = list[str](), TOP
    for panel in panels:
        body = list(_panel(panel, y))
        parts += body
        y += BAR * (1 + sum(1 + len(bars) for bars in panel.groups.values())) + GAP * (2 + len(panel.groups))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">',
            f"<style>{_STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{y}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _panel(panel: Panel, y: int) -> Iterator[str]:
    largest = max(value for bars in panel.groups.values() for value in bars.values())
    yield f'<text class="title" x="10" y="{y}">{escape(panel.title)}</text>'
    y += GAP
    for group, bars in panel.groups.items():
        y += BAR
        yield f'<text x="10" y="{y - 4}">{escape(group)}</text>'
        for number, (name, value) in enumerate(bars.items()):
            long = (WIDTH - LABELS - 120) * value / largest
            style = "bar" if number else "first"
            yield f'<text x="{LABELS - 8}" y="{y + BAR - 5}" text-anchor="end">{escape(name)}</text>'
            yield f'<rect class="{style}" x="{LABELS}" y="{y + 2}" width="{long:.1f}" height="{BAR - 4}"/>'
            yield f'<text x="{LABELS + long + 6:.1f}" y="{y + BAR - 5}">{value:,.4g}</text>'
            y += BAR
        y += GAP
