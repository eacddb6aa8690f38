"""Numbers as a reader wants them: `duration`, `rate`, `significant`."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """A time in its own units, two of them at most.

    >>> duration(0.0421), duration(7.26), duration(93), duration(1964.3), duration(7500)
    ('42 ms', '7.3 s', '1 min 33 s', '32 min 44 s', '2 h 5 min')
    """
    if seconds < 0.0995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def rate(value: float | None) -> str:
    """Something a second, or nothing.

    >>> rate(227648.3), rate(21.34), rate(None)
    ('227,648', '21.3', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def significant(value: float, digits: int = 2) -> str:
    """A value that is never rounded to nothing.

    >>> significant(0.0218), significant(13.37), significant(0.0), significant(-2.5)
    ('0.022', '13', '0', '-2.5')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def short(value: float, span: float) -> str:
    """A tick's number, with the decimals that an axis of this span needs.

    >>> short(0.5, 1.0), short(2500.0, 10000.0), short(0.0, 1.0)
    ('0.5', '2,500', '0')
    """
    digits = 0 if span >= 8 else 1 if span >= 0.8 else 2 if span >= 0.08 else 3
    return f"{value:,.{digits}f}".replace("-", "−") if value else "0"
