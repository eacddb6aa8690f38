"""`check_loss_invariants`: what every preference loss satisfies, and what a loss may claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpo_ext.testing.properties import Claims, Subject, Trial, applicable, one
from dpo_ext.testing.search import Violation, hypothesis, search
from dpo_ext.testing.strategies import PairLogps, pair_logps
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.losses.pairs import preference_loss
from dpo_ext.torch.losses.signature import check_call


def check_loss_invariants(
    loss: Callable[..., Tensor] | str,
    *,
    only_margin: bool = False,
    monotone: bool | str = False,
    convex: bool = False,
    reference_free: bool = False,
    needs_lengths: bool = False,
    couples_batch: bool = False,
    step0: float | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
    swap: Callable[[Tensor], Tensor] | None = None,
    finite_up_to: float = 1e4,
    parameters: Mapping[str, Any] | None = None,
    examples: int = 60,
) -> None:
    """Hold a preference loss to what it must satisfy, on drawn, shrunk and extreme pairs.

    For every loss: it returns (N,) or a scalar of the log-probs' dtype; it is never NaN and, up to
    ``finite_up_to``, never infinite; there its float64 gradient (random upstream) is its slope; in
    float32 it agrees with float64 in value and gradient; pairs do not influence each other,
    their order does not matter, and a scalar is the mean over pairs; inputs are left as they were;
    it reads the reference (unless ``reference_free``: then it does not).

    Args:
        loss: called with ``(logps, ref_logps)``, (N, 2) tensors, chosen first, plus ``lengths`` (N,
            2) int64 if ``needs_lengths``; or the name of a loss of the table, which brings its own
            flags.
        only_margin: adding a number to both log-probs of a pair changes nothing (log Z(x) cancels),
            on the policy's side and on the reference's; the gradients of two identical sides add
            up to 0.
        monotone: never increasing in the chosen log-prob ("c"), never decreasing in the rejected
            one ("r"); True is both.
        convex: in the two log-probs of a pair.
        reference_free: it ignores ``ref_logps``.
        needs_lengths: it reads ``lengths``, and is passed them.
        couples_batch: a pair's gradient depends on the other pairs; their independence is not
            asked.
        step0: its value at policy == reference, for every pair.
        bounds: lowest and highest value, either None.
        swap: what ``loss(pair) - loss(swapped pair)`` is, as a function of ``D``, the difference of
            the two log-ratios: ``lambda d: -beta * d`` for DPO.
        finite_up_to: largest |log-prob| and |log-ratio| at which it must be finite; lower it for
            losses of exponentials.
        parameters: of a loss of the table.
        examples: cases drawn.

    Raises:
        AssertionError: what does not hold, with the smallest case found, ready to paste.
        TypeError: the loss cannot be called like that.
        ImportError: Hypothesis is not installed.

    >>> import torch
    >>> def dpo(logps, ref_logps):
    ...     ratios = logps - ref_logps
    ...     return -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    >>> check_loss_invariants(dpo, only_margin=True, monotone=True, convex=True, step0=0.6931472)

    >>> def wrong(logps, ref_logps):
    ...     return dpo(logps, ref_logps.flip(1))
    >>> check_loss_invariants(wrong, step0=0.6931472)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: at policy == reference the loss must be 0.6931472, found 0.6...
    <BLANKLINE>
    import torch
    logps = torch.tensor([[-0.0..., -0...]], dtype=torch.float64)
    ref_logps = torch.tensor([[-0.0..., -0...]], dtype=torch.float64)
    loss(logps, ref_logps)
    """
    function: Callable[..., Tensor]
    if isinstance(loss, str):
        row = find_loss(loss)
        own = dict(parameters or {})
        name = loss
        only_margin, convex = only_margin or row.only_margin, convex or row.convex
        monotone = monotone or "c" * row.falls_in_chosen + "r" * row.rises_in_rejected
        reference_free = reference_free or not row.reference
        needs_lengths, couples_batch = row.lengths, couples_batch or row.couples_batch

        def function(logps: Tensor, ref_logps: Tensor, lengths: Tensor | None = None) -> Tensor:
            ref = None if reference_free else ref_logps
            out = preference_loss(logps, ref, loss=name, lengths=lengths, **own)
            return out.loss if couples_batch else out.per_pair

    elif parameters is not None:
        raise TypeError(
            "`parameters` are of a loss of the table; bind your own with functools.partial"
        )
    else:
        tensors = ("logps", "ref_logps", "lengths") if needs_lengths else ("logps", "ref_logps")
        check_call(loss, tensors)
        function = loss
    letters = ("cr" if monotone else "") if isinstance(monotone, bool) else monotone
    claims = Claims(
        only_margin,
        letters,
        convex,
        reference_free,
        needs_lengths,
        couples_batch,
        step0,
        (
            -math.inf if bounds[0] is None else bounds[0],
            math.inf if bounds[1] is None else bounds[1],
        ),
        swap,
        finite_up_to,
    )
    subject = Subject(function, claims, isinstance(loss, str))
    _check_what_it_reads(subject)
    hypothesis()
    import hypothesis.strategies as st

    checks = applicable(claims)

    def check(drawn: tuple[PairLogps, int, int]) -> None:
        case, *moves = drawn
        trial = Trial(subject, case, *moves)
        for property_ in checks:
            try:
                property_(trial)
            except Violation:
                checks[:] = [property_]  # from here on the search shortens this counterexample
                if len(case.logps) > 1:
                    for i in range(len(case.logps)):  # one pair that does it alone says more
                        property_(Trial(subject, one(case, i), *moves))
                raise

    search(check, st.tuples(pair_logps(), st.integers(1, 512), st.integers(0, 512)), examples)


def _check_what_it_reads(subject: Subject) -> None:
    """On usual pairs: the reference and the lengths change the loss, or are declared not to."""
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(16, 2, generator=generator, dtype=torch.float64) * 30 - 1
    ref = logps + torch.randn(16, 2, generator=generator, dtype=torch.float64)
    ref = ref.clamp(max=-0.5)
    case = PairLogps(logps, ref, torch.randint(1, 20, (16, 2), generator=generator))
    shift = torch.randn(16, 2, generator=generator, dtype=torch.float64).abs()
    value = subject.values(logps, case)
    moved = subject.values(logps, case._replace(ref_logps=ref - shift))
    if not subject.claims.reference_free and torch.equal(value, moved):
        raise AssertionError(
            "the loss does not read `ref_logps`: 16 pairs keep their loss with another one\n"
            "hint: a loss without a reference is checked with reference_free=True"
        )
    if subject.claims.reference_free and not torch.allclose(value, moved, rtol=1e-12, atol=0):
        raise AssertionError("the loss reads `ref_logps`, though reference_free=True")
    if subject.claims.needs_lengths and not subject.named:
        longer = subject.values(logps, case._replace(lengths=case.lengths + shift.long() + 1))
        if torch.equal(value, longer):
            raise AssertionError("the loss does not read `lengths`, though needs_lengths=True")
