"""Bar charts as SVG, readable on light and dark pages: the background is the page's, colours follow its preference.

Contract: `draw` is pure. It takes a chart as it is in the JSON of a result (tests/bench/scenario.py: Chart) and returns
the text of a file. A bar is as long as its value, the thin line across its end goes from the lowest to the highest
round, the dashed line is the chart's reference, and values stand in a column of their own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH = 760
BEGIN, LONGEST = 220, 300
TOP, ROW, BAR = 20, 26, 14
LETTERS = 92
_STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
.title { font-weight: 600 }
.note { fill: #59636e }
.theirs { fill: #afb8c1 }
.ours { fill: #1f6feb }
.spread { stroke: #1f2328; stroke-width: 1.5 }
.reference { stroke: #59636e; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.note { fill: #9198a1 }
.theirs { fill: #59636e }
.ours { fill: #58a6ff }
.spread { stroke: #e6edf3 }
.reference { stroke: #9198a1 }
}"""


def draw(chart: Mapping[str, Any]) -> str:
    """The chart as an SVG file."""
    bars: Sequence[Mapping[str, Any]] = chart["bars"]
    reference = chart["reference"]
    title = textwrap.wrap(chart["title"], LETTERS)
    top = TOP + ROW * len(title)
    bottom = top + ROW * len(bars)
    scale = LONGEST / (max([_highest(bar["value"]) for bar in bars] + [reference or 0]) or 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 8}" width="{WIDTH}" role="img">',
        f"<title>{escape(chart['title'])}</title>",
        f"<style>\n{_STYLE}\n</style>",
        *(f'<text class="title" x="0" y="{TOP + ROW * n}">{escape(line)}</text>' for n, line in enumerate(title)),
    ]
    for number, bar in enumerate(bars):
        parts += _row(bar, top + ROW * number, scale)
    if reference is not None:
        x = BEGIN + reference * scale
        parts.append(f'<line class="reference" x1="{x:.1f}" y1="{top - 8}" x2="{x:.1f}" y2="{bottom}"/>')
    return "\n".join([*parts, "</svg>", ""])


def number(value: float) -> str:
    """Three digits, or all of those in front of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _row(bar: Mapping[str, Any], y: int, scale: float) -> list[str]:
    middle, baseline = y + BAR / 2, y + BAR - 2
    value = bar["value"]
    median = value["median"] if isinstance(value, Mapping) else value
    parts = [
        f'<text x="{BEGIN - 10}" y="{baseline}" text-anchor="end">{escape(bar["label"])}</text>',
        f'<rect class="{"ours" if bar["ours"] else "theirs"}" x="{BEGIN}" y="{y}" width="{median * scale:.1f}"'
        f' height="{BAR}" rx="2"/>',
    ]
    if isinstance(value, Mapping):
        x1, x2 = (BEGIN + value[key] * scale for key in ("lowest", "highest"))
        parts.append(f'<line class="spread" x1="{x1:.1f}" y1="{middle}" x2="{x2:.1f}" y2="{middle}"/>')
    note = f'<tspan class="note" dx="8">{escape(bar["note"])}</tspan>' if bar["note"] else ""
    parts.append(f'<text x="{BEGIN + LONGEST + 16}" y="{baseline}">{number(median)}{note}</text>')
    return parts


def _highest(value: Mapping[str, float] | float) -> float:
    return value["highest"] if isinstance(value, Mapping) else value
