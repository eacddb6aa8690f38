"""The properties behind the checks of losses, one function each, on one case.

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
from dpo_ext.testing.strategies import PairLogps

# Steps of finite differences: one that agrees is enough, because a loss of exponentials bends
# within the large ones and rounding drowns the small ones. A wrong derivative agrees with none.
STEPS = (2.0**-14, 2.0**-22, 2.0**-30)
SIDES = ("chosen", "rejected")
UPSTREAM = (2.0, -1.0, 0.5, 4.0)  # powers of two: scaling by them adds no rounding
FLOAT32_ULP = 2.0**-23


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
        for k, name in enumerate(("logps", *names)):
            now = arguments[k]
            if version_of(now) != versions[k] or not _bits(now.detach(), before[k]):
                asked = case._replace(**dict(zip(names, before[1:], strict=True)))
                raise self.broken(f"the loss changes `{name}` in place", before[0], asked)
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


def applicable(claims: Claims) -> list[Callable[[Trial], None]]:
    """The checks that hold for all losses, then those of the claims."""
    checks = [
        remembers_nothing,
        is_finite,
        slope_is_the_gradient,
        float32_agrees,
        pairs_are_apart,
        takes_any_upstream,
        takes_any_strides,
    ]
    chosen: list[tuple[bool, Callable[[Trial], None]]] = [
        (claims.bounds != (-float("inf"), float("inf")), stays_in_bounds),
        (claims.step0 is not None, starts_right),
        (claims.only_margin, prompt_terms_cancel),
        (claims.only_margin, identical_sides_cancel),
        (bool(claims.monotone), is_monotone),
        (claims.convex, is_convex),
        (claims.only_averages, lengths_only_divide),
        (claims.swap is not None, swaps_right),
        (claims.like is not None, is_like),
    ]
    return checks + [check for wanted, check in chosen if wanted]


def remembers_nothing(trial: Trial) -> None:
    """The same input has the same answer, with and without autograd, in a buffer used before."""
    subject, case = trial.subject, trial.case
    again = subject.values(case.logps, case).detach()
    if not _bits(again, trial.values):
        raise trial.broken("the loss answers differently for the same input: it is random")
    with torch.no_grad():
        quiet = subject.values(case.logps, case)
    if not _same(quiet, trial.values, 1e-9 * (1 + trial.values.abs())):
        raise trial.broken("the loss answers differently under torch.no_grad()")
    logps, ref = case.logps.clone(), case.ref_logps.clone()
    subject.raw(logps, case._replace(ref_logps=ref))
    logps.sub_(0.5)
    ref.sub_(0.25)
    other = case._replace(ref_logps=ref)
    reused = subject.raw(logps, other).detach()
    fresh = subject.raw(logps.clone(), case._replace(ref_logps=ref.clone())).detach()
    if not _bits(reused, fresh):
        what = "the loss of a buffer that held other numbers before is not that of a fresh one"
        raise subject.broken(what, logps, other)


def is_finite(trial: Trial) -> None:
    gradient = trial.gradient.reshape(len(trial.logps), -1)
    for name, numbers in (("loss", trial.values.reshape(-1, 1)), ("gradient", gradient)):
        if numbers.isnan().any():
            raise trial.broken(f"the {name} is NaN for finite log-probs")
        infinite = (~numbers.isfinite()).any(1)
        if trial.claims.couples_batch:
            infinite = infinite.any().reshape(1)
        if (infinite & trial.within_reach()).any():
            reach = trial.claims.finite_up_to
            raise trial.broken(f"the {name} is infinite for log-probs within {reach:g}")


def stays_in_bounds(trial: Trial) -> None:
    low, high = trial.claims.bounds
    for value in trial.values.tolist():
        if not low - 1e-9 <= value <= high + 1e-9:
            raise trial.broken(f"the loss must lie in [{low:g}, {high:g}], found {value!r}")


def slope_is_the_gradient(trial: Trial) -> None:
    """The gradient lies between the slopes of the values to the left and to the right."""
    coupled = trial.claims.couples_batch
    coordinates = trial.columns
    if coupled:
        coordinates = [(i, *where[1:]) for i in range(len(trial.logps)) for where in coordinates]
    for where in coordinates:
        got = trial.gradient[where].reshape(-1)
        first = _slopes(trial, where, STEPS[0])
        wrong = _outside(got, *first, trial.values, STEPS[0]) & trial.within_reach()
        for step in STEPS[1:]:
            if not wrong.any():
                break
            wrong &= _outside(got, *_slopes(trial, where, step), trial.values, step)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            left, right = (slope[i].item() for slope in first)
            raise trial.broken(
                f"the gradient by the {trial.side(where)} of {trial.subject.entry} "
                f"{where[0] if coupled else i} is {got[i].item():.9g}, but the values have the "
                f"slope {left:.9g} to the left and {right:.9g} to the right"
            )


def _slopes(trial: Trial, where: tuple[Any, ...], step: float) -> tuple[Tensor, Tensor]:
    """Left and right slope of the values along one coordinate.

    No log-prob goes above 0: there is no right slope at 0, and the left one alone judges nothing.
    """
    slopes = []
    for sign in (-1.0, 1.0):
        moved = trial.logps.clone()
        moved[where] = _below_0(trial.logps[where], trial.logps[where] + sign * step)
        gone = (moved[where] - trial.logps[where]).reshape(-1)
        slopes.append((trial.moved(moved) - trial.values) / gone)
    return slopes[0], slopes[1]


def _below_0(start: Tensor, end: Tensor) -> Tensor:
    return torch.where(start <= 0, end.clamp(max=0), end)


def _outside(got: Tensor, left: Tensor, right: Tensor, values: Tensor, step: float) -> Tensor:
    slack = 1e-5 * (left.abs() + right.abs()) + 1e-9 + values.abs() * (2.0**-50 / step)
    low, high = torch.minimum(left, right) - slack, torch.maximum(left, right) + slack
    return ~((got >= low) & (got <= high)) & left.isfinite() & right.isfinite()


def float32_agrees(trial: Trial) -> None:
    """float32 differs from float64 by no more than rounding its inputs could explain."""
    subject, case, logps = trial.subject, trial.case, trial.logps
    reach = trial.reach.max().expand_as(trial.reach) if trial.claims.couples_batch else trial.reach
    delta = 8 * FLOAT32_ULP * reach.clamp(min=1)  # a certain log-prob rounds to 0
    spread = [trial.answer]
    for where in trial.columns:
        for sign in (1.0, -1.0):
            moved = logps.clone()
            moved[where] = _below_0(logps[where], logps[where] + sign * delta)
            spread.append(subject.values_and_gradient(moved, case))
    answer = subject.values_and_gradient(logps.float(), case)
    for k, name in enumerate(("loss", "gradient")):
        got, wanted = answer[k].double(), torch.stack([s[k] for s in spread])
        low, high = wanted.amin(0), wanted.amax(0)
        slack = 2e-5 * (1 + wanted[0].abs())
        near = trial.within_reach()
        # what float64 holds and float32 cannot is no fault
        near = near if k == 0 else trial.per_entry(near)
        holds = (low.abs() < 1e37) & (high.abs() < 1e37) & near
        bad = (got.isnan() | (got < low - slack) | (got > high + slack)) & holds
        if bad.any():
            i = tuple(bad.nonzero()[0].tolist())
            raise subject.broken(
                f"in float32 the {name} of {subject.entry} {i[0]} is {got[i].item():.9g}, in "
                f"float64 {wanted[0][i].item():.9g}",
                logps.float(),
                case,
            )


def pairs_are_apart(trial: Trial) -> None:
    """Pairs are independent, their order is nothing, and a scalar is their mean."""
    subject, case, logps = trial.subject, trial.case, trial.logps
    whole = trial.whole
    slack = 1e-9 * (1 + trial.values.abs().max())
    reverse = torch.arange(len(logps) - 1, -1, -1)
    turned = subject.raw(logps[reverse], type(case)(*(t[reverse] for t in case))).detach()
    if not _same(turned, whole if whole.dim() == 0 else whole[reverse], slack):
        raise trial.broken("the order of the pairs changes the loss")
    if trial.claims.couples_batch:
        return
    if whole.dim() == 0:
        mean = trial.values.mean()
        if not _same(whole, mean, slack):
            raise trial.broken(
                f"the loss of the batch is {whole.item():.9g}, the mean of its pairs alone "
                f"{mean.item():.9g}"
            )
        return
    for i in range(len(logps)):
        alone = subject.raw(logps[i : i + 1], one(case, i)).detach()[0]
        if not _same(alone, whole[i], slack):
            raise trial.broken(
                f"pair {i} alone has the loss {alone.item():.9g}, in the batch "
                f"{whole[i].item():.9g}"
            )


def takes_any_upstream(trial: Trial) -> None:
    """The gradient is linear in what comes from above: its sign, 0, one number for all."""
    subject, case = trial.subject, trial.case

    def pulled(upstream: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = trial.logps.clone().requires_grad_()
        value = subject.raw(leaf.clone(), case)
        return subject.pull(value, leaf, upstream(value.detach()), case)

    up = pulled(torch.ones_like)
    slack = 1e-9 * (1e-6 + up.abs())
    if not _same(pulled(lambda value: -torch.ones_like(value)), -up, slack):
        raise trial.broken("the gradient for an upstream of -1 must be minus that of 1")
    if not _same(pulled(lambda value: value.new_tensor(3.0).expand_as(value)), 3 * up, 3 * slack):
        raise trial.broken("the gradient for an upstream of 3 must be 3 times that of 1")
    if trial.within_reach().all() and pulled(torch.zeros_like).ne(0).any():
        raise trial.broken("an upstream gradient of 0 must give exactly 0")
    if trial.claims.couples_batch:
        return
    alone = trial.gradient / (len(trial.logps) if trial.whole.dim() == 0 else 1)
    wrong = ~((up == alone) | ((up - alone).abs() <= 1e-9 + 1e-6 * alone.abs()))
    wrong &= trial.per_entry(trial.within_reach())
    if wrong.any():
        i = int(wrong.nonzero()[0][0])
        raise trial.broken(
            f"the gradient of the batch by {trial.subject.entry} {i} is {up[i].tolist()}, that of "
            f"its own loss {alone[i].tolist()}"
        )


def takes_any_strides(trial: Trial) -> None:
    """Numbers in a larger buffer, or with their dimensions exchanged in memory, are the same."""
    subject, case = trial.subject, trial.case
    leaf = trial.logps.clone().requires_grad_()
    value = subject.raw(leaf.clone(), case)
    want = subject.pull(value, leaf, torch.ones_like(value), case)
    exchanged = type(case)(*(t.t().contiguous().t() for t in case))
    for form in (type(case)(*(spread_out(t) for t in case)), exchanged):
        leaf = form.logps.detach().requires_grad_()
        value = subject.raw(leaf, form)
        gradient = subject.pull(value, leaf, torch.ones_like(value), form)
        for name, got, right in (
            ("loss", value.detach(), trial.whole),
            ("gradient", gradient, want),
        ):
            if not _same(got, right, 1e-9 * (1 + right.abs())):
                raise trial.broken(
                    f"with strides {form.logps.stride()} the {name} is {got.tolist()}, contiguous "
                    f"{right.tolist()}"
                )


def spread_out(t: Tensor) -> Tensor:
    """The same numbers, every third entry of a buffer that is NaN elsewhere."""
    wide = [3 * size + 2 for size in t.shape]
    buffer = torch.full(wide, float("nan") if t.is_floating_point() else 1, dtype=t.dtype)
    view = buffer[tuple(slice(1, 1 + 3 * size, 3) for size in t.shape)]
    view.copy_(t)
    return view


def _same(a: Tensor, b: Tensor, slack: Tensor | float) -> bool:
    """Equal within slack; infinities of one sign are equal, and so are NaNs."""
    return bool(((a == b) | ((a - b).abs() <= slack) | (a.isnan() & b.isnan())).all())


def _bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def starts_right(trial: Trial) -> None:
    want = trial.claims.step0
    assert want is not None
    start = trial.case._replace(ref_logps=trial.logps)
    wanted = want(trial.case) if callable(want) else want
    for value in trial.subject.values(trial.logps, start).tolist():
        if not abs(value - wanted) <= 1e-6:
            what = f"at policy == reference the loss must be {wanted}, found {value!r}"
            raise trial.subject.broken(what, trial.logps, start)


def prompt_terms_cancel(trial: Trial) -> None:
    """A term of the prompt alone, such as log Z(x) or a common first token, cancels."""
    values, shift = trial.values, trial.shift
    for name, policy, ref in (("policy", shift, 0.0), ("reference", 0.0, shift)):
        got = trial.moved(trial.logps - policy, ref_logps=trial.case.ref_logps - ref)
        wrong = ~((got == values) | ((got - values).abs() <= 1e-9 * (1 + values.abs())))
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise trial.broken(
                f"only_margin: {shift} less in all log-probs of the {name} moves the loss of "
                f"{trial.subject.entry} {i} from {values[i].item():.9g} to {got[i].item():.9g}"
            )


def identical_sides_cancel(trial: Trial) -> None:
    """A pair of twice the same completion trains nothing: its two gradients add up to 0."""
    if trial.subject.entry != "pair":
        return
    case = PairLogps(*(t[:, :1].repeat(1, 2) for t in trial.case))
    gradient = trial.subject.values_and_gradient(case.logps, case)[1]
    wrong = ~(gradient.sum(1).abs() <= 1e-6 * gradient.abs().sum(1)) & gradient.isfinite().all(1)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise trial.subject.broken(
            "only_margin: the gradients of two identical sides must add up to 0, found "
            f"{gradient[i, 0].item():.9g} and {gradient[i, 1].item():.9g} for pair {i}",
            case.logps,
            case,
        )


def lengths_only_divide(trial: Trial) -> None:
    """Twice the log-prob of twice as many tokens is the same average."""
    case, values = trial.case, trial.values
    for where in trial.columns:
        scaled = {name: getattr(case, name).clone() for name in case._fields}
        for t in scaled.values():
            t[where] *= 2
        got = trial.moved(scaled.pop("logps"), **scaled)
        wrong = ~_close(got, values)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise trial.broken(
                f"only_averages: twice the {trial.side(where)} with twice the length moves the "
                f"loss of pair {i} from {values[i].item():.9g} to {got[i].item():.9g}"
            )


def _close(got: Tensor, want: Tensor) -> Tensor:
    return (got == want) | ((got - want).abs() <= 1e-9 * (1 + want.abs()))


def is_monotone(trial: Trial) -> None:
    """Also in the reference, with the other sign."""
    for where, falls, which in _directions(trial):
        gradient = trial.gradient[where]
        wrong = (gradient > 1e-12 if falls else gradient < -1e-12) & which
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise trial.broken(
                f"monotone: the loss {'increases' if falls else 'decreases'} in the "
                f"{trial.side(where)} of {trial.subject.entry} {i}, slope {gradient[i].item():.9g}"
            )
        if trial.claims.reference_free or trial.claims.couples_batch:
            continue
        ref = trial.case.ref_logps.clone()
        ref[where] -= trial.shift
        change = trial.moved(trial.logps, ref_logps=ref) - trial.values
        slack = 1e-9 * (1 + trial.values.abs())
        wrong = (change > slack if falls else change < -slack) & which
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise trial.broken(
                f"monotone: the loss {'decreases' if falls else 'increases'} in the reference's "
                f"{trial.side(where)} of {trial.subject.entry} {i}: {trial.shift} less moves it by "
                f"{change[i].item():.9g}"
            )


def _directions(trial: Trial) -> list[tuple[tuple[Any, ...], bool, Tensor]]:
    """Index, whether the loss must fall there, and for which entries."""
    every = torch.ones(len(trial.logps), dtype=torch.bool)
    if trial.subject.entry == "pair":
        letters = trial.claims.monotone
        return [((..., k), k == 0, every) for k in range(2) if "cr"[k] in letters]
    if trial.subject.entry == "completion":
        good = trial.case.labels
        return [((...,), True, good), ((...,), False, ~good)]
    return [((..., 0), True, every)]


def is_convex(trial: Trial) -> None:
    values = trial.values
    step = 16 * torch.tensor([trial.shift, trial.other], dtype=trial.logps.dtype)
    end = trial.logps - step
    at_end, middle = trial.moved(end), trial.moved((trial.logps + end) / 2)
    chord = (values + at_end) / 2
    wrong = (middle - chord > 1e-9 * (1 + values.abs() + at_end.abs())) & chord.isfinite()
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise trial.broken(
            f"convex: half way to logps - {step.tolist()} the loss of pair {i} is "
            f"{middle[i].item():.9g}, above {chord[i].item():.9g}, the mean of the two ends"
        )


def swaps_right(trial: Trial) -> None:
    assert trial.claims.swap is not None
    swapped = PairLogps(*(t.flip(1) for t in trial.case))
    back = trial.subject.values(swapped.logps, swapped).detach()
    ratios = trial.logps - trial.case.ref_logps
    want, got = trial.claims.swap(ratios[:, 0] - ratios[:, 1]), trial.values - back
    wrong = ~((got - want).abs() <= 1e-6 * (1 + trial.values.abs() + back.abs()))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise trial.broken(
            f"swap: loss(pair) - loss(swapped pair) must be {want[i].item():.9g} for pair {i}, "
            f"found {got[i].item():.9g}"
        )


def is_like(trial: Trial) -> None:
    """Its values are those of another loss; its gradient is held to the values elsewhere."""
    subject, case = trial.subject, trial.case
    assert trial.claims.like is not None
    other = Subject(
        trial.claims.like, trial.claims, others=subject.others, named=True, entry=subject.entry
    )
    want = other.values(trial.logps, case).detach()
    wrong = ~_close(trial.values, want) & want.isfinite() & trial.within_reach()
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise trial.broken(
            f"like: the loss of {subject.entry} {i} must be {want[i].item():.9g}, found "
            f"{trial.values[i].item():.9g}"
        )
