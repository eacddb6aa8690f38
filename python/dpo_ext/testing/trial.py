"""One case of a loss under test: the loss is called, what comes back is checked, and kept.

A case is a tuple of tensors: ``logps`` and ``ref_logps``, (N, 2) of pairs, (N,) of single
completions, (N, K) of lists, then what else a loss of that kind may read. N "pairs" below are the N
entries of the first dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.testing.search import Refused, Violation, version_of, violation

SIDES = ("chosen", "rejected")
# Powers of two, so that scaling by them adds no rounding; 2^16 is a loss scale of half precision.
UPSTREAM = (2.0, -0.5, 2.0**16, -(2.0**-16))


class Claims(NamedTuple):
    """What a loss is held to, beside what holds for all."""

    only_margin: bool = False
    monotone: str = ""
    convex: bool = False
    reference_free: bool = False
    couples_batch: bool = False
    only_averages: bool = False
    step0: float | Callable[..., float] | None = None
    bounds: tuple[float, float] = (-float("inf"), float("inf"))
    swap: Callable[[Tensor], Tensor] | None = None
    like: Callable[..., Tensor] | None = None
    finite_up_to: float = 1e4


class Subject:
    """A loss under test: calls it, checks what comes back, and gives one value a pair.

    ``others`` names the fields of a case that it is passed behind the two log-probs.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        claims: Claims,
        *,
        others: tuple[str, ...] = (),
        named: bool = False,
        entry: str = "pair",
    ) -> None:
        self.function = function
        self.named = named  # of the table, where a parameter of 0 may switch the lengths off
        self.claims = claims
        self.others = others
        self.entry = entry
        self._given: list[tuple[str, Tensor, Tensor, int]] = []
        self.call = f"loss({', '.join(('logps', 'ref_logps', *others))})"

    def raw(self, logps: Tensor, case: Any) -> Tensor:
        """The function's answer, in the form it has; an input that it writes to is told first."""
        names = ("ref_logps", *self.others)
        given = [getattr(case, name) for name in names]
        given = [t.to(logps.dtype) if t.is_floating_point() else t for t in given]
        arguments = [logps, *given]
        before = [t.detach().clone() for t in arguments]
        versions = [version_of(t) for t in arguments]
        fault: Exception | None = None
        try:
            value = self.function(*arguments)
        except Exception as error:
            fault = error
        self._given = [*zip(("logps", *names), arguments, before, versions, strict=True)]
        self._check_given(case)
        if fault is not None:
            empty = "lengths" in self.others and bool((case.lengths == 0).any())
            if empty and isinstance(fault, ValueError):
                raise Refused from fault
            raise self.broken(
                f"the loss raised {type(fault).__name__}: {fault}", logps, case
            ) from fault
        if not isinstance(value, Tensor) or value.shape not in ((), logps.shape[:1]):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise self.broken(
                f"the loss must be a scalar or ({len(logps)},), found {found}", logps, case
            )
        if value.dtype != logps.dtype:
            raise self.broken(
                f"{logps.dtype} log-probs must give {logps.dtype}, found {value.dtype}", logps, case
            )
        return value

    def _check_given(self, case: Any) -> None:
        """No input of the last call was written to."""
        for name, now, before, version in self._given:
            if version_of(now) != version or not equal_bits(now.detach(), before):
                own = {field: kept for field, _, kept, _ in self._given}
                logps = own.pop("logps")
                asked = case._replace(**own)
                raise self.broken(f"the loss changes `{name}` in place", logps, asked)

    def check_first_call(self, value: Tensor, logps: Tensor, case: Any) -> None:
        """The loss of its first call is the one of a later one."""
        if not equal_bits(self.values(logps, case).detach(), value.detach()):
            raise self.broken("the loss of its first call is another one than later", logps, case)

    def values(self, logps: Tensor, case: Any) -> Tensor:
        """(N,) loss of each pair; (1,) mean of the batch where pairs are coupled."""
        value = self.raw(logps, case)
        if self.claims.couples_batch:
            return value.mean().reshape(1)
        if value.dim() == 1:
            return value
        alone = [self.raw(logps[i : i + 1], one(case, i)).reshape(()) for i in range(len(logps))]
        return torch.stack(alone)

    def values_and_gradient(self, logps: Tensor, case: Any) -> tuple[Tensor, Tensor]:
        """The values, and their derivatives by each pair's own log-probs, in their shape."""
        leaf = logps.detach().clone().requires_grad_()
        values = self.values(leaf.clone(), case)
        upstream = torch.tensor(UPSTREAM, dtype=logps.dtype).repeat(len(values))[: len(values)]
        gradient = self.pull(values, leaf, upstream, case)
        return values.detach(), gradient / upstream.reshape(-1, *[1] * (logps.dim() - 1))

    def pull(self, value: Tensor, leaf: Tensor, upstream: Tensor, case: Any) -> Tensor:
        """The gradient of ``leaf`` for an upstream."""
        if not value.requires_grad:
            raise self.broken("the loss does not depend on `logps` for autograd", leaf, case)
        try:
            (gradient,) = torch.autograd.grad(value, leaf, upstream, allow_unused=True)
        except RuntimeError as error:
            raise self.broken(f"the gradient raised RuntimeError: {error}", leaf, case) from error
        if gradient is None:
            raise self.broken("the loss gives `logps` no gradient", leaf, case)
        self._check_given(case)
        return gradient

    def broken(self, what: str, logps: Tensor, case: Any, **others: Any) -> Violation:
        own = {name: getattr(case, name) for name in self.others}
        ref = case.ref_logps.to(logps.dtype)
        return violation(what, self.call, logps=logps, ref_logps=ref, **own, **others)


def one(case: Any, i: int) -> Any:
    return type(case)(*(t[i : i + 1] for t in case))


class Trial:
    """One drawn case; what several checks need is computed once."""

    def __init__(self, subject: Subject, case: Any, shift: int, other: int) -> None:
        self.subject, self.case, self.claims = subject, case, subject.claims
        self.logps = case.logps
        self.shift, self.other = shift / 64, other / 64
        entries = torch.stack((case.logps, case.ref_logps, case.logps - case.ref_logps), 1)
        self.reach = entries.abs().flatten(1).amax(1)

    @functools.cached_property
    def answer(self) -> tuple[Tensor, Tensor]:
        return self.subject.values_and_gradient(self.logps, self.case)

    @property
    def values(self) -> Tensor:
        return self.answer[0]

    @property
    def gradient(self) -> Tensor:
        return self.answer[1]

    @functools.cached_property
    def whole(self) -> Tensor:
        """The function's answer for the batch."""
        return self.subject.raw(self.logps, self.case).detach()

    @property
    def columns(self) -> list[tuple[Any, ...]]:
        """Indices of the log-probs of one side, ``(..., side)``."""
        return [(...,)] if self.logps.dim() == 1 else [(..., k) for k in range(self.logps.shape[1])]

    def side(self, where: tuple[Any, ...]) -> str:
        """What the log-prob at an index is called."""
        if self.logps.dim() == 1:
            return "log-prob"
        k = where[-1]
        return f"{SIDES[k]} log-prob" if self.subject.entry == "pair" else f"log-prob {k}"

    def per_entry(self, numbers: Tensor) -> Tensor:
        """(N,) numbers in a shape that broadcasts against the log-probs."""
        return numbers.reshape(-1, *[1] * (self.logps.dim() - 1))

    def moved(self, logps: Tensor, **fields: Tensor) -> Tensor:
        """Values of other log-probs."""
        return self.subject.values(logps, self.case._replace(**fields)).detach()

    def within_reach(self) -> Tensor:
        """(N,), or (1,) where pairs are coupled: whether the loss must be finite."""
        inside = self.reach <= self.claims.finite_up_to
        return inside.all().reshape(1) if self.claims.couples_batch else inside

    def broken(self, what: str) -> Violation:
        return self.subject.broken(what, self.logps, self.case)


def same(a: Tensor, b: Tensor, slack: Tensor | float) -> bool:
    """Equal within slack; infinities of one sign are equal, and so are NaNs."""
    return bool(((a == b) | ((a - b).abs() <= slack) | (a.isnan() & b.isnan())).all())


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def close(got: Tensor, want: Tensor) -> Tensor:
    """Which entries are equal but for rounding."""
    return (got == want) | ((got - want).abs() <= 1e-9 * (1 + want.abs()))
