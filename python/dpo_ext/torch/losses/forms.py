"""The stable scalar forms that the losses are written in, and the view of a batch of pairs that
they read.

Every function here takes tensors without a graph: the losses carry their derivatives in closed
form, because autograd through hand-made softplus, clip or logarithm forms is wrong or NaN exactly
where training starts or where a pair is extreme (policy == reference; log-ratios of several hundred
nats).

N pairs; every tensor is (N,) float32 or float64 unless it says otherwise.
"""

from __future__ import annotations

import functools
import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Number: TypeAlias = float | Tensor
"""A parameter: a float for all pairs, or a tensor (N,)."""


@functools.lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=dtype, device="cpu")


def times(x: Tensor, k: Number) -> Tensor:
    """``x * k``; a float becomes a cached tensor, which saves 4 of the 6 us that PyTorch takes to
    wrap a Python number. Tensor subclasses and the compiler see the number itself.
    """
    if isinstance(k, float) and not torch.compiler.is_compiling() and type(x) is Tensor:
        return x * _constant(k, x.dtype)
    return x * k


def over(x: Tensor, k: Number) -> Tensor:
    """``x / k``, as `times`."""
    if isinstance(k, float) and not torch.compiler.is_compiling() and type(x) is Tensor:
        return x / _constant(k, x.dtype)
    return x / k


class Symbols:
    """Log-probs of N pairs, under the symbols of the formulas.

    ``c, r`` summed log-prob of chosen, rejected under the policy; ``cr, rr`` under the reference;
    ``xw = c - cr``, ``xl = r - rr``, ``D = xw - xl``; ``nw, nl`` scored tokens; ``cn = c/nw``, ``rn
    = r/nl``. A sequence without a scored token has the average 0, not 0/0.
    """

    __slots__ = ("lengths", "logps", "ref_logps", "xl", "xw")

    def __init__(self, logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None) -> None:
        self.logps = logps
        self.ref_logps = ref_logps
        self.lengths = lengths
        if ref_logps is not None:
            # (c - cr) - (r - rr) in this order: (c - r) - (cr - rr) loses 1.2e-4 nats in float32.
            self.xw, self.xl = (logps - ref_logps).unbind(1)

    @property
    def c(self) -> Tensor:
        return self.logps.select(1, 0)

    @property
    def r(self) -> Tensor:
        return self.logps.select(1, 1)

    @property
    def cr(self) -> Tensor:
        assert self.ref_logps is not None  # the row says that it needs a reference; checked before
        return self.ref_logps.select(1, 0)

    @property
    def rr(self) -> Tensor:
        assert self.ref_logps is not None
        return self.ref_logps.select(1, 1)

    @property
    def D(self) -> Tensor:  # noqa: N802 - the name in the formulas
        return self.xw - self.xl

    def m(self, beta: Number) -> Tensor:
        """The DPO margin ``beta*D``."""
        return times(self.xw - self.xl, beta)

    @property
    def nw(self) -> Tensor:
        return self._length(0)

    @property
    def nl(self) -> Tensor:
        return self._length(1)

    @property
    def cn(self) -> Tensor:
        return self.c / self.nw

    @property
    def rn(self) -> Tensor:
        return self.r / self.nl

    def _length(self, side: int) -> Tensor:
        assert self.lengths is not None
        return self.lengths.select(1, side).to(self.logps.dtype).clamp(min=1)


def s(z: Tensor) -> Tensor:
    """Sigmoid."""
    return torch.sigmoid(z)


def ds(z: Tensor) -> Tensor:
    """Derivative of the sigmoid, as ``s(z)*s(-z)``; ``1 - s(z)`` loses all digits from z = 17 in
    float32.
    """
    return torch.sigmoid(z) * torch.sigmoid(-z)


def sp(z: Tensor) -> Tensor:
    """Softplus ``log(1 + e^z)``; ``torch.nn.functional.softplus`` is linear beyond 20, 2e-9 off in
    float64.
    """
    return sp_of_minus(-z)


def sp_of_minus(z: Tensor) -> Tensor:
    """``sp(-z)``, which is nearer to what torch has."""
    return -logsigmoid(z)


def relu(z: Tensor) -> Tensor:
    """``max(0, z)``."""
    return z.clamp(min=0)


def indicator(condition: Tensor, like: Tensor) -> Tensor:
    """1 where the condition holds, else 0, in the dtype of ``like``."""
    return condition.to(like.dtype)


def log(x: Number) -> Number:
    """Natural logarithm of a parameter."""
    return torch.log(x) if isinstance(x, Tensor) else math.log(x)


def scaled_exp(k: Number, b: Tensor) -> Tensor:
    """``k * e^b``, which overflows only where the product does: k is small, ``e^b`` is not."""
    half = torch.exp(b / 2)
    return (half * k) * half


def exp_difference(a: Tensor, b: Tensor, k: Number = 1.0) -> Tensor:
    """``k * (e^a - e^b)`` without inf - inf and without cancellation; overflows only where the
    result does.

    Same as ``k * (a.exp() - b.exp())``. Formed as ``sign(d) * k * e^(max/2) * (1 - e^-|d|) *
    e^(max/2)``, ``d = a - b``.
    """
    d = a - b
    half = torch.exp(torch.maximum(a, b) / 2)
    value = torch.sign(d) * (half * k * -torch.expm1(-d.abs())) * half
    return torch.where(d == 0, torch.zeros_like(d), value)


def sigmoid_times_exp(u: Tensor, b: Tensor, k: Number) -> Tensor:
    """``k * s(-u) * e^b``; where ``e^b`` would overflow, from the sum of the logarithms, never 0 *
    inf.
    """
    return torch.where(b > 60, scaled_exp(k, b - sp(u)), torch.sigmoid(-u) * torch.exp(b) * k)


def below_zero(a: Tensor) -> Tensor:
    """An average log-prob kept below 0 by half an ulp of 1, so that ``log(1 - e^a)`` is finite.

    A near-certain sequence rounds to exactly 0 in float32.
    """
    return a.clamp(max=-(2.0**-24) if a.dtype == torch.float32 else -(2.0**-53))


def log_odds(a: Tensor) -> Tensor:
    """``a - log(1 - e^a)`` for a < 0."""
    log_complement = torch.where(
        a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a))
    )
    return a - log_complement
