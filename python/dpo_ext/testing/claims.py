"""The properties of what a loss claims, one function each, on one case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_ext.testing.strategies import PairLogps
from dpo_ext.testing.trial import Claims, Subject, Trial, close


def claimed(claims: Claims) -> list[Callable[[Trial], None]]:
    """The checks that a loss asks for by its claims."""
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
    return [check for wanted, check in chosen if wanted]


def stays_in_bounds(trial: Trial) -> None:
    low, high = trial.claims.bounds
    for value in trial.values.tolist():
        if not low - 1e-9 <= value <= high + 1e-9:
            raise trial.broken(f"the loss must lie in [{low:g}, {high:g}], found {value!r}")


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
        wrong = ~close(got, values)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise trial.broken(
                f"only_averages: twice the {trial.side(where)} with twice the length moves the "
                f"loss of pair {i} from {values[i].item():.9g} to {got[i].item():.9g}"
            )


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
    """Along a line on which both log-probs fall, and along one on which one falls and one rises."""
    step = 16 * torch.tensor([trial.shift, trial.other], dtype=trial.logps.dtype)
    both, one, other = step, step * step.new_tensor([1, 0]), step * step.new_tensor([0, 1])
    for start, end in ((torch.zeros_like(step), both), (one, other)):
        first = trial.values if not start.any() else trial.moved(trial.logps - start)
        last = trial.moved(trial.logps - end)
        middle, chord = trial.moved(trial.logps - (start + end) / 2), (first + last) / 2
        wrong = (middle - chord > 1e-9 * (1 + first.abs() + last.abs())) & chord.isfinite()
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise trial.broken(
                f"convex: half way from logps - {start.tolist()} to logps - {end.tolist()} the "
                f"loss of pair {i} is {middle[i].item():.9g}, above {chord[i].item():.9g}, the "
                "mean of the two ends"
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
    wrong = ~close(trial.values, want) & want.isfinite() & trial.within_reach()
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise trial.broken(
            f"like: the loss of {subject.entry} {i} must be {want[i].item():.9g}, found "
            f"{trial.values[i].item():.9g}"
        )
