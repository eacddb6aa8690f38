"""Rows of marks over one horizontal axis: `bars`, `dots`, `dumbbells`.

They are HTML and not SVG, so that a phone shows names and values in their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dpo_ext.pages.axes import Axis
from dpo_ext.pages.charts import caption


@dataclass(frozen=True)
class Row:
    """A name, a value, how it is written, and the class of its colour."""

    name: str
    value: float
    text: str
    colour: str = "policy"


def bars(
    rows: Sequence[Row], *, axis: Axis, title: str, keys: Sequence[tuple[str, str]] = ()
) -> str:
    """Bars from 0: ``axis`` must be linear and start there, or lengths would say nothing."""
    if axis.is_log or axis.low != 0:
        raise ValueError("bars need a linear axis that starts at 0")
    marks = [
        f'<i class="fill {row.colour}" style="width:{_percent(axis, row.value)}"></i>'
        for row in rows
    ]
    return _tracks(
        [(r.name, m, r.text) for r, m in zip(rows, marks, strict=True)], axis, title, keys
    )


def dots(
    rows: Sequence[Row], *, axis: Axis, title: str, keys: Sequence[tuple[str, str]] = ()
) -> str:
    """A dot a row: a place and no length, so that the axis may be logarithmic."""
    marks = [_mark(axis, row.value, row.colour, row.text) for row in rows]
    return _tracks(
        [(r.name, m, r.text) for r, m in zip(rows, marks, strict=True)], axis, title, keys
    )


def dumbbells(
    rows: Sequence[tuple[str, float, float]],
    *,
    before: tuple[str, str],
    after: tuple[str, str],
    title: str,
    form: str = "{:.2f}",
) -> str:
    """Two values a name, and the line between them; ``before`` and ``after`` are label and
    colour.
    """
    axis = Axis.around([0.0, *(value for _, a, b in rows for value in (a, b))])
    cells = []
    for name, a, b in rows:
        left, right = sorted((axis.share(a), axis.share(b)))
        between = f'<i class=between style="left:{left:.2%};width:{right - left:.2%}"></i>'
        marks = [
            _mark(axis, value, colour, f"{label}: {form.format(value)}")
            for (label, colour), value in ((before, a), (after, b))
        ]
        text = f"{form.format(a)} → {form.format(b)}".replace("-", "−")
        cells.append((name, between + "".join(marks), text))
    return _tracks(cells, axis, title, (before, after))


def _mark(axis: Axis, value: float, colour: str, name: str) -> str:
    return (
        f'<i class="mark {colour}" style="left:{_percent(axis, value)}" title="{escape(name)}"></i>'
    )


def _percent(axis: Axis, value: float) -> str:
    return f"{axis.share(value):.2%}"


def _tracks(
    rows: Sequence[tuple[str, str, str]],
    axis: Axis,
    title: str,
    keys: Sequence[tuple[str, str]],
) -> str:
    ticks = axis.ticks()
    lines = "".join(f'<u style="left:{_percent(axis, tick)}"></u>' for tick in ticks)
    cells = "".join(
        f"<span class=name>{escape(name)}</span><span class=track>{lines}{marks}</span>"
        f"<span class=value>{escape(text)}</span>"
        for name, marks, text in rows
    )
    numbers = "".join(
        f'<span style="left:{_percent(axis, tick)}">{escape(axis.text(tick))}</span>'
        for tick in ticks
    )
    return (
        f"<figure>{caption(title, keys)}<div class=tracks>{cells}"
        f"<span class=name></span><span class=ticks>{numbers}</span><span></span></div></figure>"
    )
