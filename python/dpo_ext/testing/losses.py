"""`check_loss_invariants`: what every preference loss satisfies, and what a loss may claim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_ext.testing.claims import claimed
from dpo_ext.testing.corpus import pair_cases
from dpo_ext.testing.properties import EVERY
from dpo_ext.testing.search import Violation, hypothesis, search
from dpo_ext.testing.strategies import PairLogps, pair_logps
from dpo_ext.testing.trial import SIDES, Claims, Subject, Trial, one
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
    only_averages: bool = False,
    one_sided: bool = False,
    like: Callable[..., Tensor] | str | None = None,
    step0: float | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
    swap: Callable[[Tensor], Tensor] | None = None,
    finite_up_to: float = 1e4,
    parameters: Mapping[str, Any] | None = None,
    examples: int = 60,
) -> None:
    """Hold a preference loss to what it must satisfy, on fixed, drawn and shrunk pairs.

    For every loss: it returns (N,) or a scalar of the log-probs' dtype; it is never NaN and, up to
    ``finite_up_to``, never infinite; there its float64 gradient is its slope, for any upstream and
    exactly 0 for none; in float32 it agrees with float64 in value and gradient; pairs do not
    influence each other, their order does not matter, and a scalar is the mean over pairs; strides
    and ``torch.no_grad`` change nothing; inputs are left as they were and nothing is remembered; it
    reads the reference (unless ``reference_free``: then it does not), of both sides.

    The fixed cases come first: N = 1 to 5, each column alone at ``finite_up_to``, log-probs of
    exactly 0 and -1e-6, lengths of 0, 1 and 10^5 (an empty completion may be refused with a
    ValueError). Cases depend on nothing in the caller's file.

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
        only_averages: of log-probs and lengths it reads the quotients alone.
        one_sided: it reads the reference or the length of one side only, for both.
        like: a loss that it must equal, as a function called alike, or the name of a loss of the
            table with its ``parameters``: a missing factor is found by nothing else.
        step0: its value at policy == reference, for every pair.
        bounds: lowest and highest value, either None.
        swap: what ``loss(pair) - loss(swapped pair)`` is, as a function of ``D``, the difference of
            the two log-ratios: ``lambda d: -beta * d`` for DPO.
        finite_up_to: largest |log-prob| and |log-ratio| at which it must be finite; lower it for
            losses of exponentials.
        parameters: of a loss of the table, `loss` or ``like``.
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

    >>> check_loss_invariants(dpo, like="dpo", parameters={"beta": 0.1})

    >>> def wrong(logps, ref_logps):
    ...     return dpo(logps, ref_logps.flip(1))
    >>> check_loss_invariants(wrong, step0=0.6931472)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: at policy == reference the loss must be 0.6931472, found ...
    <BLANKLINE>
    import torch
    logps = torch.tensor([[-...]], dtype=torch.float64)
    ref_logps = torch.tensor([[-...]], dtype=torch.float64)
    loss(logps, ref_logps)
    """
    function: Callable[..., Tensor]
    if isinstance(loss, str):
        row = find_loss(loss)
        function = _of_the_table(loss, reference_free or not row.reference, parameters)
        only_margin, convex = only_margin or row.only_margin, convex or row.convex
        monotone = monotone or "c" * row.falls_in_chosen + "r" * row.rises_in_rejected
        reference_free = reference_free or not row.reference
        needs_lengths, couples_batch = row.lengths, couples_batch or row.couples_batch
    elif parameters is not None and not isinstance(like, str):
        raise TypeError(
            "`parameters` are of a loss of the table; bind your own with functools.partial"
        )
    else:
        tensors = ("logps", "ref_logps", "lengths") if needs_lengths else ("logps", "ref_logps")
        check_call(loss, tensors)
        function = loss
    if isinstance(like, str):
        like = _of_the_table(like, not find_loss(like).reference, parameters)
    letters = ("cr" if monotone else "") if isinstance(monotone, bool) else monotone
    claims = Claims(
        only_margin=only_margin,
        monotone=letters,
        convex=convex,
        reference_free=reference_free,
        couples_batch=couples_batch,
        only_averages=only_averages,
        step0=step0,
        bounds=limits(bounds),
        swap=swap,
        like=like,
        finite_up_to=finite_up_to,
    )
    others = ("lengths",) if needs_lengths else ()
    subject = Subject(function, claims, others=others, named=isinstance(loss, str))
    _check_what_it_reads(subject, one_sided or subject.named)
    hypothesis()
    import hypothesis.strategies as st

    run(
        subject,
        st.tuples(pair_logps(), st.integers(1, 512), st.integers(0, 512)),
        examples,
        pair_cases(finite_up_to, lengths=needs_lengths),
    )


def _of_the_table(
    name: str, reference_free: bool, parameters: Mapping[str, Any] | None
) -> Callable[..., Tensor]:
    own, couples = dict(parameters or {}), find_loss(name).couples_batch

    def function(logps: Tensor, ref_logps: Tensor, lengths: Tensor | None = None) -> Tensor:
        ref = None if reference_free else ref_logps
        out = preference_loss(logps, ref, loss=name, lengths=lengths, **own)
        return out.loss if couples else out.per_pair

    return function


def limits(bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    low, high = bounds
    return -math.inf if low is None else low, math.inf if high is None else high


MOVES = ((96, 0), (7, 320), (1, 1))  # of the fixed cases, in 1/64


def run(
    subject: Subject,
    strategy: Any,
    examples: int,
    corpus: Sequence[Any],
    checks: Sequence[Callable[[Trial], None]] = (),
) -> None:
    """Hold a loss to all that applies and to `checks`, on fixed cases and on drawn ones."""
    asked = [*EVERY, *claimed(subject.claims), *checks]

    def check(drawn: tuple[Any, int, int]) -> None:
        case, *moves = drawn
        trial = Trial(subject, case, *moves)
        for property_ in asked:
            try:
                property_(trial)
            except Violation:
                asked[:] = [property_]  # from here on the search shortens this counterexample
                if len(case.logps) > 1:
                    for i in range(len(case.logps)):  # one pair that does it alone says more
                        property_(Trial(subject, one(case, i), *moves))
                raise

    fixed = [(case, *MOVES[k % len(MOVES)]) for k, case in enumerate(corpus)]
    search(check, strategy, examples, fixed)


CROSSED = 4.0  # of the table no loss gets beyond 1.8, one with its lengths exchanged from 6 on


def _check_what_it_reads(subject: Subject, one_sided: bool) -> None:
    """On usual pairs: the reference and the lengths change the loss, or are declared not to."""
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(16, 2, generator=generator, dtype=torch.float64) * 30 - 1
    ref = logps + torch.randn(16, 2, generator=generator, dtype=torch.float64)
    ref = ref.clamp(max=-0.5)
    case = PairLogps(logps, ref, torch.randint(1, 20, (16, 2), generator=generator))
    shift = torch.randn(16, 2, generator=generator, dtype=torch.float64).abs()
    value = subject.values(logps, case).detach().clone()
    moved = subject.values(logps, case._replace(ref_logps=ref - shift))
    if not subject.claims.reference_free and torch.equal(value, moved):
        raise AssertionError(
            "the loss does not read `ref_logps`: 16 pairs keep their loss with another one\n"
            "hint: a loss without a reference is checked with reference_free=True"
        )
    subject.check_first_call(value, logps, case)
    if subject.claims.reference_free and not torch.allclose(value, moved, rtol=1e-12, atol=0):
        raise AssertionError("the loss reads `ref_logps`, though reference_free=True")
    if subject.others and not subject.named:
        longer = subject.values(logps, case._replace(lengths=case.lengths + shift.long() + 1))
        if torch.equal(value, longer):
            raise AssertionError("the loss does not read `lengths`, though needs_lengths=True")
    if one_sided:
        return
    sources = [] if subject.claims.reference_free else ["ref_logps"]
    gradient = subject.values_and_gradient(logps, case)[1]
    for source in [*sources, *subject.others]:
        moves = torch.zeros(2, 2)  # [column of the source, gradient by the side], relative
        for k in range(2):
            field = getattr(case, source).clone()
            field[:, k] = field[:, k] - 1.5 if source == "ref_logps" else field[:, k] * 2 + 1
            got = subject.values_and_gradient(logps, case._replace(**{source: field}))[1]
            moves[k] = (got - gradient).abs().mean(0) / (1e-9 + gradient.abs().mean(0))
        for side, name in enumerate(SIDES):
            if moves[1 - side, side] > 1e-9 > moves[side, side]:
                raise AssertionError(
                    f"the gradient by the {name} log-prob depends on the {SIDES[1 - side]} column "
                    f"of `{source}` and not on its own\n"
                    "hint: a loss that means it is checked with one_sided=True"
                )
        if moves[0, 1] * moves[1, 0] > CROSSED * moves[0, 0] * moves[1, 1] + 1e-12:
            raise AssertionError(
                f"the gradient by each log-prob depends more on the other column of `{source}` "
                "than on its own\n"
                "hint: a loss that means it is checked with one_sided=True"
            )
