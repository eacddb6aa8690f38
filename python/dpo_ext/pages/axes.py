"""`Axis`: round ticks, and the map from values to places, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_ext.pages.numbers import short


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high``; ``form`` writes a tick, by default as short as the span
    allows.
    """

    low: float
    high: float
    is_log: bool = False
    form: str = ""

    @classmethod
    def around(cls, values: Sequence[float], form: str = "") -> Axis:
        """A linear axis with some room on both ends."""
        low, high = min(values), max(values)
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        return cls(low - room, high + room, form=form)

    @classmethod
    def from_zero(cls, values: Sequence[float], form: str = "") -> Axis:
        """A linear axis that starts at 0, with some room above."""
        return cls(0.0, 1.06 * max(values) or 1.0, form=form)

    @classmethod
    def decades(cls, values: Sequence[float], form: str = "") -> Axis:
        """A logarithmic axis over whole powers of ten; every value must be positive."""
        low = math.floor(math.log10(min(values)) + 1e-9)
        high = math.ceil(math.log10(max(values)) - 1e-9)
        return cls(10.0**low, 10.0 ** max(high, low + 1), True, form)

    @classmethod
    def tight_log(cls, values: Sequence[float], form: str = "") -> Axis:
        """A logarithmic axis no wider than the values; every value must be positive."""
        low, high = min(values), max(values)
        return cls(low * 0.93, high * 1.07, True, form)

    def share(self, value: float) -> float:
        """Where a value is, 0 at the low end and 1 at the high one."""
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(value) - low) / (high - low)
        return (value - self.low) / ((self.high - self.low) or 1.0)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers on the axis, about ``count`` of them."""
        if self.is_log and len(found := self._log_ticks(count)) > 1:
            return found
        span = (self.high - self.low) or 1.0
        unit = 10.0 ** math.floor(math.log10(span / count))
        step = unit * min((1, 2, 5, 10), key=lambda k: abs(span / (k * unit) - count))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        first = math.floor(math.log10(self.low))
        last = math.ceil(math.log10(self.high))
        for leads in ((1, 2, 5), (1,)):
            found = [
                lead * 10.0**k
                for k in range(first, last + 1)
                for lead in leads
                if self.low * (1 - 1e-9) <= lead * 10.0**k <= self.high * (1 + 1e-9)
            ]
            if len(found) <= 2 * count:
                break
        return found[:: -(-len(found) // (2 * count)) or 1]

    def text(self, tick: float) -> str:
        """A tick in words."""
        if self.form:
            return self.form.format(tick)
        if self.is_log:
            for size, unit in ((1e6, " M"), (1e3, " k")):
                if tick >= size * (1 - 1e-9):
                    return f"{tick / size:g}{unit}"
            return f"{tick:.6g}"
        return short(tick, self.high - self.low)
