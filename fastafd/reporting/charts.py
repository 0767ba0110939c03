"""Line charts as inline SVG for the page, without a library or a script; the page's style sheet has the colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape


def line_chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]], top: float | None = None) -> str:
    """Lines against the step as inline SVG; empty without points.

    lines: points (step, value) by name. The axis goes from 0, or the lowest negative value, to `top` or the highest
    value.
    """
    everything = [point for points in lines.values() for point in points]
    if not everything:
        return ""
    ups = _ticks(min(0.0, *(y for _, y in everything)), top or max(y for _, y in everything))
    end = max(x for x, _ in everything)
    alongs = [tick for tick in _ticks(0.0, end) if tick <= end]
    left, right, head, foot, width, height = 42, 350, 28, 190, 360, 226

    def at(x: float, y: float) -> tuple[float, float]:
        up = (y - ups[0]) / (ups[-1] - ups[0])
        return left + x / end * (right - left), foot - up * (foot - head)

    drawn = []
    for tick in ups:
        y = at(0, tick)[1]
        drawn.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in alongs:
        drawn.append(f'<text x="{at(tick, 0)[0]:.1f}" y="{foot + 16}" text-anchor="middle">{tick:g}</text>')
    drawn.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">step</text>')
    for index, (name, points) in enumerate(lines.items()):
        places = [at(x, y) for x, y in points]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline class="line{index}" points="{way}"/>')
        x = left + 110 * index
        drawn.append(f'<path class="line{index}" d="M{x} 10h24"/><text x="{x + 30}" y="14">{escape(name)}</text>')
        if len(points) <= 60:
            drawn += [_mark(index, *place) for place in places]
        drawn.append(_mark(index, x + 12, 10))
    last = ", ".join(f"{name} at the end {points[-1][1]:.3g}" for name, points in lines.items())
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)} by step: {escape(last)}">'
        f"{''.join(drawn)}</svg></figure>"
    )


def _mark(index: int, x: float, y: float) -> str:
    """A circle for the first line, a square for the second."""
    if index == 0:
        return f'<circle class="mark0" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
    return f'<rect class="mark1" x="{x - 2.5:.1f}" y="{y - 2.5:.1f}" width="5" height="5"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to six round numbers; the first is at most `low`, the last at least `high`."""
    span = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(span))
    step = next(power * factor for factor in (0.2, 0.5, 1, 2) if span / (power * factor) <= 5)
    return [step * count for count in range(math.floor(low / step), math.ceil((low + span) / step) + 1)]
