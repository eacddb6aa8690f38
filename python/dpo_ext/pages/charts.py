"""Inline SVG charts that follow the reader's light or dark theme: every colour is a CSS class of
`report.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 34, 42


@dataclass(frozen=True)
class Series:
    """One named set of values: ``colour`` is the class ``policy``, ``reference``, ``truth`` or
    ``plain``.
    """

    label: str
    y: Sequence[float]
    colour: str
    x: Sequence[float] = ()
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A named horizontal line: a start, a bound, a target."""

    label: str
    y: float


def line_chart(
    series: Sequence[Series], *, x_label: str, y_label: str, levels: Sequence[Level] = ()
) -> str:
    """Lines over steps, with named levels."""
    values = [v for s in series for v in s.y if math.isfinite(v)] + [level.y for level in levels]
    frame = _Frame(
        (min(s.x[0] for s in series), max(s.x[-1] for s in series)),
        _padded(values),
        x_label,
        y_label,
    )
    parts = [frame.axes()]
    for level in levels:
        y = frame.y(level.y)
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(WIDTH - RIGHT - 4, y - 5, level.label, "note", "end"))
    for s in series:
        points = [
            (frame.x(x), frame.y(y)) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line {s.colour}{" faint" if s.faint else ""}" points="{path}"/>'
        )
        if s.dots:
            parts += [
                f'<circle class="dot {s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
                for x, y in points
            ]
    return _svg(parts, [s for s in series if not s.faint], y_label)


def histogram(series: Sequence[Series], *, x_label: str, bins: int = 24) -> str:
    """Shares of the values of each series, drawn over each other."""
    every = np.concatenate([np.asarray(s.y, float) for s in series])
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    shares = [np.histogram(s.y, edges)[0] / max(1, len(s.y)) for s in series]
    frame = _Frame(
        (edges[0], edges[-1]),
        (0.0, 1.1 * max(float(s.max()) for s in shares)),
        x_label,
        "share",
        "{:.0%}",
    )
    parts = [frame.axes()]
    for s, share in zip(series, shares, strict=True):
        for left, right, value in zip(edges[:-1], edges[1:], share, strict=True):
            if value > 0:
                x, width = frame.x(left), frame.x(right) - frame.x(left)
                parts.append(
                    f'<rect class="bar {s.colour}" x="{x + 0.5:.1f}" y="{frame.y(value):.1f}" '
                    f'width="{width - 1:.1f}" '
                    f'height="{frame.y(0) - frame.y(value):.1f}"><title>{escape(s.label)}: '
                    f"{value:.1%} between {left:.2f} and {right:.2f}</title></rect>"
                )
        mean = frame.x(float(np.mean(s.y)))
        parts.append(
            f'<line class="mean {s.colour}" x1="{mean:.1f}" x2="{mean:.1f}" y1="{TOP}" '
            f'y2="{frame.y(0):.1f}"/>'
        )
    return _svg(parts, series, x_label)


def scatter(
    x: Sequence[float], y: Sequence[float], *, x_label: str, y_label: str, diagonal: str
) -> str:
    """Points, with the line y = x named ``diagonal``."""
    both = _padded([*x, *y])
    frame = _Frame(_padded(x), both, x_label, y_label)
    low, high = frame.x_range
    parts = [
        frame.axes(),
        f'<line class="level" x1="{frame.x(low):.1f}" y1="{frame.y(low):.1f}" '
        f'x2="{frame.x(high):.1f}" y2="{frame.y(high):.1f}"/>',
        _text(frame.x(high) - 6, frame.y(high) + 16, diagonal, "note", "end"),
    ]
    parts += [
        f'<circle class="dot policy thin" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.4"/>'
        for a, b in zip(x, y, strict=True)
    ]
    return _svg(parts, (), f"{y_label} against {x_label}")


def dumbbells(
    rows: Sequence[tuple[str, float, float]], *, before: Series, after: Series, x_label: str
) -> str:
    """One row a name: two values, and the line between them."""
    step, left = 26, 150
    height = TOP + step * len(rows) + BOTTOM
    low, high = _padded([0.0, *(v for _, a, b in rows for v in (a, b))])
    scale = (WIDTH - RIGHT - left) / (high - low)

    def place(value: float) -> float:
        return left + (value - low) * scale

    bottom = TOP + step * len(rows)
    parts = []
    for tick in _ticks(low, high):
        parts.append(
            f'<line class="grid" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="{TOP}" '
            f'y2="{bottom}"/>'
        )
        parts.append(_text(place(tick), bottom + 16, _number(tick, high - low), "tick", "middle"))
    parts.append(
        f'<line class="axis" x1="{place(0):.1f}" x2="{place(0):.1f}" y1="{TOP}" y2="{bottom}"/>'
    )
    for i, (name, a, b) in enumerate(rows):
        y = TOP + step * (i + 0.5)
        parts.append(_text(left - 10, y + 4, name, "name", "end"))
        parts.append(
            f'<line class="between" x1="{place(a):.1f}" x2="{place(b):.1f}" y1="{y}" y2="{y}"/>'
        )
        for series, value in ((before, a), (after, b)):
            parts.append(
                f'<circle class="dot {series.colour}" cx="{place(value):.1f}" cy="{y}" r="5">'
                f"<title>{escape(series.label)}: {value:.3f}</title></circle>"
            )
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 6, x_label, "label", "middle"))
    return _svg(parts, (before, after), x_label, height)


def bars(rows: Sequence[tuple[str, float]], *, unit: str) -> str:
    """Horizontal bars, for seconds by stage."""
    step, left = 26, 190
    height = 8 + step * len(rows) + 8
    scale = (WIDTH - 70 - left) / max(max(v for _, v in rows), 1e-9)
    parts = []
    for i, (name, value) in enumerate(rows):
        y = 8 + step * i
        width = max(1.0, value * scale)
        parts.append(_text(left - 10, y + 17, name, "name", "end"))
        parts.append(
            f'<rect class="bar policy" x="{left}" y="{y + 4}" width="{width:.1f}" '
            f'height="{step - 8}" rx="3"/>'
        )
        parts.append(_text(left + width + 6, y + 17, f"{value:.1f} {unit}", "tick", "start"))
    return _svg(parts, (), f"{unit} by stage", height)


class _Frame:
    """Axes with ticks, and the map from values to places."""

    def __init__(
        self,
        x_range: tuple[float, float],
        y_range: tuple[float, float],
        x_label: str,
        y_label: str,
        y_format: str = "",
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.labels = x_label, y_label
        self.y_format = y_format

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1.0) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        parts = []
        for tick in _ticks(*self.y_range):
            y = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            span = self.y_range[1] - self.y_range[0]
            label = self.y_format.format(tick) if self.y_format else _number(tick, span)
            parts.append(_text(LEFT - 8, y + 4, label, "tick", "end"))
        for tick in _ticks(*self.x_range):
            label = _number(tick, self.x_range[1] - self.x_range[0])
            parts.append(_text(self.x(tick), HEIGHT - BOTTOM + 17, label, "tick", "middle"))
        bottom = HEIGHT - BOTTOM
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        )
        parts.append(
            _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.labels[0], "label", "middle")
        )
        parts.append(_text(LEFT - 44, TOP - 14, self.labels[1], "label", "start"))
        return "".join(parts)


def _svg(parts: Sequence[str], legend: Sequence[Series], title: str, height: float = HEIGHT) -> str:
    keys, x = [], WIDTH - RIGHT
    for s in reversed(legend):
        x -= 7 * len(s.label) + 24
        keys.append(f'<circle class="dot {s.colour}" cx="{x:.0f}" cy="{TOP - 18}" r="5"/>')
        keys.append(_text(x + 10, TOP - 14, s.label, "label", "start"))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "".join(keys)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about ``count`` of them."""
    span = (high - low) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = unit * min((1, 2, 5, 10), key=lambda k: abs(span / (k * unit) - count))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float, span: float) -> str:
    digits = 0 if span >= 8 else 1 if span >= 0.8 else 2 if span >= 0.08 else 3
    return f"{value:.{digits}f}" if value else "0"
