"""Inline SVG charts that follow the reader's light or dark theme: every colour is a CSS class of
`page.py`.

Names and keys stand above a chart in HTML, so that they wrap, and keep their size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from dpo_ext.pages.axes import Axis

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 46


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
    """A named horizontal line: a start, a bound, a target. Its name stands above the line, or
    below, on the right or on the left, wherever the chart has room.
    """

    label: str
    y: float
    below: bool = False
    left: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    title: str,
    levels: Sequence[Level] = (),
    y_axis: Axis | None = None,
    x_axis: Axis | None = None,
) -> str:
    """Lines over steps, with named levels; by default the y axis is linear, around the values."""
    values = [v for s in series for v in s.y if math.isfinite(v)] + [level.y for level in levels]
    steps = Axis(min(s.x[0] for s in series), max(s.x[-1] for s in series))
    frame = _Frame(x_axis or steps, y_axis or Axis.around(values), x_label)
    parts = [frame.axes()]
    for level in levels:
        y = frame.y(level.y)
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
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
                f'<circle class="dot {s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                for x, y in points
            ]
    for level in levels:  # last, so that no curve lies over a name
        x, anchor = (LEFT + 6, "start") if level.left else (WIDTH - RIGHT - 4, "end")
        y = frame.y(level.y) + (15 if level.below else -6)
        parts.append(_text(x, y, level.label, "note", anchor))
    return _figure(parts, title, [s for s in series if not s.faint])


def histogram(series: Sequence[Series], *, x_label: str, title: str, bins: int = 24) -> str:
    """Shares of the values of each series, drawn over each other."""
    every = np.concatenate([np.asarray(s.y, float) for s in series])
    low, high = float(every.min()), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    shares = [np.histogram(s.y, edges)[0] / max(1, len(s.y)) for s in series]
    most = max(float(s.max()) for s in shares)
    frame = _Frame(Axis(edges[0], edges[-1]), Axis.from_zero([most], "{:.0%}"), x_label)
    parts = [frame.axes()]
    for s, share in zip(series, shares, strict=True):
        for left, right, value in zip(edges[:-1], edges[1:], share, strict=True):
            if value > 0:
                name = f"{s.label}: {value:.1%} between {left:.2f} and {right:.2f}"
                parts.append(frame.bar(left, right, value, s.colour, name))
        mean = frame.x(float(np.mean(s.y)))
        parts.append(
            f'<line class="mean {s.colour}" x1="{mean:.1f}" x2="{mean:.1f}" y1="{TOP}" '
            f'y2="{frame.y(0):.1f}"/>'
        )
    return _figure(parts, title, series)


def counted(counts: Sequence[int], edges: Sequence[int], *, x_label: str, title: str) -> str:
    """Bars over the bins ``edges``, each with its count."""
    frame = _Frame(
        Axis(edges[0], edges[-1], form="{:,.0f}"), Axis.from_zero(counts, "{:,.0f}"), x_label
    )
    parts = [frame.axes()]
    for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            name = f"{left:,} to {right - 1:,}: {count:,}"
            parts.append(frame.bar(left, right, count, "policy", name))
            middle = (frame.x(left) + frame.x(right)) / 2
            parts.append(_text(middle, frame.y(count) - 4, f"{count:,}", "count", "middle"))
    return _figure(parts, title, ())


def scatter(
    x: Sequence[float], y: Sequence[float], *, x_label: str, title: str, diagonal: str = ""
) -> str:
    """Points, with the line y = x if it has a name."""
    frame = _Frame(Axis.around(x), Axis.around([*x, *y] if diagonal else y), x_label)
    parts = [frame.axes()]
    for axis, at in ((frame.x_axis, frame.x), (frame.y_axis, frame.y)):
        if axis.low < 0 < axis.high:
            ends = (
                f'x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
                if axis is frame.x_axis
                else f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at(0):.1f}" y2="{at(0):.1f}"'
            )
            parts.append(f'<line class="axis thin" {ends}/>')
    parts += [
        f'<circle class="dot policy thin" cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="2.6"/>'
        for a, b in zip(x, y, strict=True)
    ]
    if diagonal:
        low, high = frame.x_axis.low, frame.x_axis.high
        parts.append(
            f'<line class="level" x1="{frame.x(low):.1f}" y1="{frame.y(low):.1f}" '
            f'x2="{frame.x(high):.1f}" y2="{frame.y(high):.1f}"/>'
        )
        parts.append(_text(frame.x(high) - 12, frame.y(high) + 24, diagonal, "note", "end"))
    return _figure(parts, title, ())


class _Frame:
    """Both axes with ticks, and the places of values."""

    def __init__(self, x_axis: Axis, y_axis: Axis, x_label: str) -> None:
        self.x_axis, self.y_axis, self.x_label = x_axis, y_axis, x_label

    def x(self, value: float) -> float:
        return LEFT + self.x_axis.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y_axis.share(value) * (HEIGHT - TOP - BOTTOM)

    def bar(self, left: float, right: float, value: float, colour: str, name: str) -> str:
        """A bar from 0 to a value, whose name shows when it is pointed at."""
        x, width = self.x(left), self.x(right) - self.x(left)
        return (
            f'<rect class="bar {colour}" x="{x + 0.5:.1f}" y="{self.y(value):.1f}" '
            f'width="{width - 1:.1f}" height="{self.y(0) - self.y(value):.1f}">'
            f"<title>{escape(name)}</title></rect>"
        )

    def axes(self) -> str:
        parts = []
        for tick in self.y_axis.ticks():
            y = self.y(tick)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(_text(LEFT - 8, y + 4, self.y_axis.text(tick), "tick", "end"))
        bottom = HEIGHT - BOTTOM
        for tick in self.x_axis.ticks():
            text, x, anchor = self.x_axis.text(tick), self.x(tick), "middle"
            if len(text) > 3 and self.x_axis.share(tick) > 0.98:
                x, anchor = WIDTH, "end"
            parts.append(_text(x, bottom + 17, text, "tick", anchor))
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        )
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(_text(middle, HEIGHT - 6, self.x_label, "label", "middle"))
        return "".join(parts)


def _figure(parts: Sequence[str], title: str, keys: Sequence[Series]) -> str:
    return (
        f"<figure>{caption(title, [(s.label, s.colour) for s in keys])}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def caption(title: str, keys: Sequence[tuple[str, str]]) -> str:
    """What a chart shows, and the colours of it by name."""
    return (
        f"<figcaption><b>{escape(title)}</b>"
        + "".join(
            f'<span class=key><i class="{colour}"></i>{escape(label)}</span>'
            for label, colour in keys
        )
        + "</figcaption>"
    )


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
