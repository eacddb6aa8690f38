"""The properties that hold for every loss, one function each, on one case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.testing.trial import Trial, equal_bits, one, same

# Steps of finite differences: one that agrees is enough, because a loss of exponentials bends
# within the large ones and rounding drowns the small ones. A wrong derivative agrees with none.
STEPS = (2.0**-14, 2.0**-22, 2.0**-30)
FLOAT32_ULP = 2.0**-23


def remembers_nothing(trial: Trial) -> None:
    """The same input has the same answer, with and without autograd, in a buffer used before."""
    subject, case = trial.subject, trial.case
    kept = subject.raw(case.logps, case).detach()
    before = kept.clone()
    again = subject.values(case.logps, case).detach()
    if not equal_bits(again, trial.values):
        raise trial.broken("the loss answers differently for the same input: it is random")
    with torch.no_grad():
        quiet = subject.values(case.logps, case)
    if not same(quiet, trial.values, 1e-9 * (1 + trial.values.abs())):
        raise trial.broken("the loss answers differently under torch.no_grad()")
    logps, ref = case.logps.clone(), case.ref_logps.clone()
    subject.raw(logps, case._replace(ref_logps=ref))
    amounts = _unlike(logps)
    logps.sub_(amounts)
    ref.sub_(amounts / 8)
    other = case._replace(ref_logps=ref)
    reused = subject.raw(logps, other).detach()
    if not equal_bits(kept, before):
        raise trial.broken("the loss that was returned changes with a later call")
    fresh = subject.raw(logps.clone(), case._replace(ref_logps=ref.clone())).detach()
    if not equal_bits(reused, fresh):
        what = "the loss of a buffer that held other numbers before is not that of a fresh one"
        raise subject.broken(what, logps, other)


def _unlike(logps: Tensor) -> Tensor:
    """Numbers to take from log-probs, not the same from all: that would cancel in a margin."""
    return torch.arange(1, logps.numel() + 1).reshape(logps.shape) % 5 / 4


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


def reaches_its_end(trial: Trial) -> None:
    """At a log-prob of exactly 0 value and gradient are what they tend to from below.

    Judged alone is a loss that settles there, in this case and with the other numbers moved a
    little: one that is infinite near 0 has no such value, one with a kink in 0 no such gradient.
    """
    if trial.claims.couples_batch:
        return
    for where in trial.columns:
        at_0 = trial.logps[where] == 0
        if not at_0.any():
            continue
        case, values, gradient = trial.case, trial.values, trial.gradient[where]
        near, slope, steady, jumps = _below(trial, where, case)
        wrong = steady & ((gradient - slope).abs() > 1e-2 * slope.abs() + 1e-5)
        jumps &= at_0
        wrong &= at_0
        if not (wrong | jumps).any():
            continue
        for moved in _beside(trial, where):
            _, slope_there, _, jumps_there = _below(trial, where, moved)
            jumps &= jumps_there
            wrong &= (slope_there - slope).abs() <= 0.1 * slope.abs() + 1e-6
        for found, what in (
            (jumps, "the loss jumps from {near:.9g} just below to {value:.9g}"),
            (
                wrong,
                "the gradient is {gradient:.9g}, below it the values have the slope {slope:.9g}",
            ),
        ):
            if found.any():
                i = int(found.nonzero()[0])
                told = what.format(
                    near=near[i], value=values[i], gradient=gradient[i], slope=slope[i]
                )
                which = f"the {trial.side(where)} of {trial.subject.entry} {i}"
                raise trial.broken(f"where {which} is exactly 0, {told}")


def _below(
    trial: Trial, where: tuple[Any, ...], case: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values just below a coordinate, slope to there, whether it is steady, whether they jump."""

    def at(step: float) -> Tensor:
        logps = case.logps.clone()
        logps[where] -= step
        return trial.moved(logps, ref_logps=case.ref_logps)

    start, far, middle, near = (at(step) for step in (0.0, *STEPS))
    slope, other = (start - far) / STEPS[0], (start - middle) / STEPS[1]
    rounding = start.abs() * (2.0**-50 / STEPS[1])
    steady = (slope - other).abs() <= 1e-3 * slope.abs() + 1e-6 + rounding
    jump = (near - start).abs()
    jumps = (jump > 1e-4 * (1 + start.abs())) & ((near - middle).abs() < 1e-2 * jump)
    return near, slope, steady, jumps


def _beside(trial: Trial, where: tuple[Any, ...]) -> list[Any]:
    """Two cases off a kink of this one: some of the other numbers a little lower, then the rest."""
    case = trial.case
    numbers = torch.stack((case.logps, case.ref_logps))
    amounts = torch.arange(1, numbers[:, :1].numel() + 1, dtype=numbers.dtype) / 128
    amounts = amounts.reshape(numbers[:, :1].shape)
    own = torch.zeros_like(numbers[0], dtype=torch.bool)
    own[where] = True
    favoured = torch.stack((~own, own))  # the other log-probs, and the reference of this one
    cases = []
    for chosen in (favoured, ~favoured):
        chosen[0] &= ~own
        moved = numbers - chosen * amounts
        cases.append(case._replace(logps=moved[0], ref_logps=moved[1]))
    return cases


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
    if not same(turned, whole if whole.dim() == 0 else whole[reverse], slack):
        raise trial.broken("the order of the pairs changes the loss")
    if trial.claims.couples_batch:
        return
    if whole.dim() == 0:
        mean = trial.values.mean()
        if not same(whole, mean, slack):
            raise trial.broken(
                f"the loss of the batch is {whole.item():.9g}, the mean of its pairs alone "
                f"{mean.item():.9g}"
            )
        return
    for i in range(len(logps)):
        alone = subject.raw(logps[i : i + 1], one(case, i)).detach().reshape(-1)[0]
        if not same(alone, whole[i], slack):
            raise trial.broken(
                f"pair {i} alone has the loss {alone.item():.9g}, in the batch "
                f"{whole[i].item():.9g}"
            )


def takes_any_upstream(trial: Trial) -> None:
    """The gradient is linear in what comes from above: its sign, 0, one number for all."""
    subject, case = trial.subject, trial.case

    def pulled(factor: float) -> Tensor:  # the same number for all, of stride 0
        leaf = trial.logps.clone().requires_grad_()
        value = subject.raw(leaf.clone(), case)
        return subject.pull(value, leaf, value.new_tensor(factor).expand_as(value), case)

    up = pulled(1.0)
    slack = 1e-9 * up.abs() + 1e-12 * (1 + up.abs().max())
    for factor in (-1.0, 3.0, -(2.0**16), 2.0**-16):
        if not same(pulled(factor), factor * up, abs(factor) * slack):
            raise trial.broken(
                f"the gradient for an upstream of {factor:g} must be {factor:g} times that of 1"
            )
    leaf, later = (trial.logps.clone().requires_grad_() for _ in range(2))
    value = subject.raw(leaf.clone(), case)
    subject.raw(later - _unlike(trial.logps), case)
    if not same(subject.pull(value, leaf, torch.ones_like(value), case), up, slack):
        raise trial.broken("the gradient changes when the loss is called again before it is taken")
    if trial.within_reach().all() and pulled(0.0).ne(0).any():
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
            if not same(got, right, 1e-9 * (1 + right.abs())):
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


EVERY = (
    remembers_nothing,
    is_finite,
    slope_is_the_gradient,
    reaches_its_end,
    float32_agrees,
    pairs_are_apart,
    takes_any_upstream,
    takes_any_strides,
)
