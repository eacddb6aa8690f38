"""The properties behind `check_loss_invariants`, one function each, on one drawn case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.testing.search import Violation, violation
from dpo_ext.testing.strategies import PairLogps

# Steps of finite differences: one that agrees is enough, because a loss of exponentials bends
# within the large ones and rounding drowns the small ones. A wrong derivative agrees with none.
STEPS = (2.0**-14, 2.0**-22, 2.0**-30)
SIDES = ("chosen", "rejected")
UPSTREAM = (2.0, -1.0, 0.5, 4.0)  # powers of two: scaling by them adds no rounding
FLOAT32_ULP = 2.0**-23


class Claims(NamedTuple):
    """What a loss is held to, beside what holds for all."""

    only_margin: bool
    monotone: str
    convex: bool
    reference_free: bool
    needs_lengths: bool
    couples_batch: bool
    step0: float | None
    bounds: tuple[float, float]
    swap: Callable[[Tensor], Tensor] | None
    finite_up_to: float


class Subject:
    """A loss under test: calls it, checks what comes back, and gives one value a pair."""

    def __init__(self, function: Callable[..., Tensor], claims: Claims, named: bool) -> None:
        self.function = function
        self.named = named  # of the table, where a parameter of 0 may switch the lengths off
        self.claims = claims
        self.call = f"loss(logps, ref_logps{', lengths' if claims.needs_lengths else ''})"

    def raw(self, logps: Tensor, case: PairLogps) -> Tensor:
        """The function's answer, in the form it has."""
        arguments = [logps, case.ref_logps.to(logps.dtype)]
        if self.claims.needs_lengths:
            arguments.append(case.lengths)
        try:
            value = self.function(*arguments)
        except Exception as error:
            raise self.broken(
                f"the loss raised {type(error).__name__}: {error}", logps, case
            ) from error
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

    def values(self, logps: Tensor, case: PairLogps) -> Tensor:
        """(N,) loss of each pair; (1,) mean of the batch where pairs are coupled."""
        value = self.raw(logps, case)
        if self.claims.couples_batch:
            return value.mean().reshape(1)
        if value.dim() == 1:
            return value
        alone = [self.raw(logps[i : i + 1], one(case, i)).reshape(()) for i in range(len(logps))]
        return torch.stack(alone)

    def values_and_gradient(self, logps: Tensor, case: PairLogps) -> tuple[Tensor, Tensor]:
        """The values, and (N, 2) their derivatives by each pair's own log-probs."""
        leaf = logps.detach().clone().requires_grad_()
        values = self.values(leaf, case)
        if not values.requires_grad:
            raise self.broken("the loss does not depend on `logps` for autograd", logps, case)
        upstream = torch.tensor(UPSTREAM, dtype=logps.dtype).repeat(len(values))[: len(values)]
        (gradient,) = torch.autograd.grad(values, leaf, upstream, allow_unused=True)
        if gradient is None:
            raise self.broken("the loss gives `logps` no gradient", logps, case)
        return values.detach(), gradient / upstream.reshape(-1, 1)

    def broken(self, what: str, logps: Tensor, case: PairLogps, **others: Any) -> Violation:
        lengths = {"lengths": case.lengths} if self.claims.needs_lengths else {}
        ref = case.ref_logps.to(logps.dtype)
        return violation(what, self.call, logps=logps, ref_logps=ref, **lengths, **others)


def one(case: PairLogps, i: int) -> PairLogps:
    return PairLogps(*(t[i : i + 1] for t in case))


class Trial:
    """One drawn case; what several checks need is computed once."""

    def __init__(self, subject: Subject, case: PairLogps, shift: int, other: int) -> None:
        self.subject, self.case, self.claims = subject, case, subject.claims
        self.logps = case.logps
        self.shift, self.other = shift / 64, other / 64
        entries = torch.cat((case.logps, case.ref_logps, case.logps - case.ref_logps), 1)
        self.reach = entries.abs().amax(1)

    @functools.cached_property
    def answer(self) -> tuple[Tensor, Tensor]:
        return self.subject.values_and_gradient(self.logps, self.case)

    @property
    def values(self) -> Tensor:
        return self.answer[0]

    @property
    def gradient(self) -> Tensor:
        return self.answer[1]

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
        leaves_inputs_alone,
        is_finite,
        slope_is_the_gradient,
        float32_agrees,
        pairs_are_apart,
    ]
    chosen: list[tuple[bool, Callable[[Trial], None]]] = [
        (claims.bounds != (-float("inf"), float("inf")), stays_in_bounds),
        (claims.step0 is not None, starts_right),
        (claims.only_margin, prompt_terms_cancel),
        (claims.only_margin, identical_sides_cancel),
        (bool(claims.monotone), is_monotone),
        (claims.convex, is_convex),
        (claims.swap is not None, swaps_right),
    ]
    return checks + [check for wanted, check in chosen if wanted]


def leaves_inputs_alone(trial: Trial) -> None:
    """No input is written to, and the same input has the same answer."""
    case, before = trial.case, PairLogps(*(t.clone() for t in trial.case))
    again = trial.subject.values(case.logps, case).detach()
    for name, now, was in zip(PairLogps._fields, case, before, strict=True):
        if not torch.equal(now, was):
            raise trial.subject.broken(f"the loss changes `{name}` in place", before.logps, before)
    if not ((again == trial.values) | (again.isnan() & trial.values.isnan())).all():
        raise trial.broken("the loss answers differently for the same input: it is random")


def is_finite(trial: Trial) -> None:
    for name, numbers in (("loss", trial.values.reshape(-1, 1)), ("gradient", trial.gradient)):
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
    coordinates: list[tuple[Any, int]] = [(slice(None), side) for side in range(2)]
    if coupled:
        coordinates = [(pair, side) for pair in range(len(trial.logps)) for side in range(2)]
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
                f"the gradient by the {SIDES[where[1]]} log-prob of pair "
                f"{where[0] if coupled else i} is {got[i].item():.9g}, but the values have the "
                f"slope {left:.9g} to the left and {right:.9g} to the right"
            )


def _slopes(trial: Trial, where: tuple[Any, int], step: float) -> tuple[Tensor, Tensor]:
    """Left and right slope of the values along one coordinate."""
    slopes = []
    for sign in (-1.0, 1.0):
        moved = trial.logps.clone()
        moved[where] += sign * step
        slopes.append(sign * (trial.moved(moved) - trial.values) / step)
    return slopes[0], slopes[1]


def _outside(got: Tensor, left: Tensor, right: Tensor, values: Tensor, step: float) -> Tensor:
    slack = 1e-5 * (left.abs() + right.abs()) + 1e-9 + values.abs() * (2.0**-50 / step)
    low, high = torch.minimum(left, right) - slack, torch.maximum(left, right) + slack
    return ~((got >= low) & (got <= high)) & left.isfinite() & right.isfinite()


def float32_agrees(trial: Trial) -> None:
    """float32 differs from float64 by no more than rounding its inputs could explain."""
    subject, case, logps = trial.subject, trial.case, trial.logps
    delta = 8 * FLOAT32_ULP * trial.reach.max()
    spread = [trial.answer]
    for side in range(2):
        for sign in (1.0, -1.0):
            moved = logps.clone()
            moved[:, side] += sign * delta
            spread.append(subject.values_and_gradient(moved, case))
    answer = subject.values_and_gradient(logps.float(), case)
    for k, name in enumerate(("loss", "gradient")):
        got, wanted = answer[k].double(), torch.stack([s[k] for s in spread])
        low, high = wanted.amin(0), wanted.amax(0)
        slack = 2e-5 * (1 + wanted[0].abs())
        near = trial.within_reach()
        # what float64 holds and float32 cannot is no fault
        holds = (low.abs() < 1e37) & (high.abs() < 1e37) & (near if k == 0 else near.reshape(-1, 1))
        bad = (got.isnan() | (got < low - slack) | (got > high + slack)) & holds
        if bad.any():
            i = tuple(bad.nonzero()[0].tolist())
            raise subject.broken(
                f"in float32 the {name} of pair {i[0]} is {got[i].item():.9g}, in float64 "
                f"{wanted[0][i].item():.9g}",
                logps.float(),
                case,
            )


def pairs_are_apart(trial: Trial) -> None:
    """Pairs are independent, their order is nothing, and a scalar is their mean."""
    subject, case, logps = trial.subject, trial.case, trial.logps
    whole = subject.raw(logps, case).detach()
    slack = 1e-9 * (1 + trial.values.abs().max())
    reverse = torch.arange(len(logps) - 1, -1, -1)
    turned = subject.raw(logps[reverse], PairLogps(*(t[reverse] for t in case))).detach()
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


def _same(a: Tensor, b: Tensor, slack: Tensor) -> bool:
    """Equal within slack; infinities of one sign are equal."""
    return bool(((a == b) | ((a - b).abs() <= slack)).all())


def starts_right(trial: Trial) -> None:
    want = trial.claims.step0
    assert want is not None
    start = trial.case._replace(ref_logps=trial.logps)
    for value in trial.subject.values(trial.logps, start).tolist():
        if not abs(value - want) <= 1e-6:
            what = f"at policy == reference the loss must be {want}, found {value!r}"
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
                f"only_margin: {shift} less in both log-probs of the {name} moves the loss of pair "
                f"{i} from {values[i].item():.9g} to {got[i].item():.9g}"
            )


def identical_sides_cancel(trial: Trial) -> None:
    """A pair of twice the same completion trains nothing: its two gradients add up to 0."""
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


def is_monotone(trial: Trial) -> None:
    for letter, side, sign in (("c", 0, 1.0), ("r", 1, -1.0)):
        wrong = sign * trial.gradient[:, side] > 1e-12
        if letter in trial.claims.monotone and wrong.any():
            i = int(wrong.nonzero()[0])
            raise trial.broken(
                f"monotone: the loss {('increases', 'decreases')[side]} in the {SIDES[side]} "
                f"log-prob of pair {i}, slope {trial.gradient[i, side].item():.9g}"
            )


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
