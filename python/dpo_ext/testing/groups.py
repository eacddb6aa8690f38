"""`check_unpaired_loss` and `check_list_loss`: losses of single completions, and of lists of them.

N examples or lists, K completions of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ext.testing.corpus import pair_cases
from dpo_ext.testing.losses import limits, run
from dpo_ext.testing.search import hypothesis
from dpo_ext.testing.strategies import GRID, PairLogps, pair_logps
from dpo_ext.testing.trial import Claims, Subject, Trial
from dpo_ext.torch.losses.lists import LISTWISE, list_loss
from dpo_ext.torch.losses.row import find_row
from dpo_ext.torch.losses.signature import check_call
from dpo_ext.torch.losses.single import UNPAIRED, unpaired_loss

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

OWN = "`parameters` are of a named loss; bind your own with functools.partial"


class UnpairedLogps(NamedTuple):
    """``logps`` and ``ref_logps`` (N,) float64, ``labels`` (N,) bool."""

    logps: Tensor
    ref_logps: Tensor
    labels: Tensor


class ListLogps(NamedTuple):
    """``logps``, ``ref_logps`` and ``scores`` (N, K) float64, ``counts`` (N,) int64."""

    logps: Tensor
    ref_logps: Tensor
    scores: Tensor
    counts: Tensor


def check_unpaired_loss(
    loss: Callable[..., Tensor] | str,
    *,
    like: Callable[..., Tensor] | str | None = None,
    only_ratio: bool = True,
    monotone: bool = True,
    couples_batch: bool = False,
    step0: float | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
    finite_up_to: float = 1e4,
    parameters: Mapping[str, Any] | None = None,
    examples: int = 40,
) -> None:
    """Hold a loss of single labelled completions to what it must satisfy.

    For every such loss what `check_loss_invariants` asks of a pair's: finite, a gradient that is
    the slope for any upstream, float32 that agrees with float64, examples apart from each other,
    any order and strides, inputs left as they were, nothing remembered. It reads the reference and
    the labels. N = 1 to 5 and more, labels all desirable, all not, and mixed.

    Args:
        loss: called with ``(logps, ref_logps, labels)``, (N,) tensors, labels bool, True is
            desirable; returns (N,) or their mean. Or a name that `unpaired_loss` has.
        like: a loss that it must equal: a function called alike, or a name, with ``parameters``.
        only_ratio: it reads ``logps - ref_logps`` alone.
        monotone: never increasing in the log-prob of a desirable completion, never decreasing in
            that of another.
        couples_batch: an example's gradient depends on the other ones.
        step0: its value at policy == reference.
        bounds: lowest and highest value, either None.
        finite_up_to: largest |log-prob| and |log-ratio| at which it must be finite.
        parameters: of the named loss.
        examples: cases drawn.

    Raises:
        AssertionError: what does not hold, with a case to paste.
        TypeError: the loss cannot be called like that.

    >>> def kto(logps, ref_logps, labels):
    ...     a = 0.1 * (logps - ref_logps)
    ...     return torch.where(labels, torch.sigmoid(-a), torch.sigmoid(a))
    >>> check_unpaired_loss(kto, step0=0.5, bounds=(0, 1))
    >>> check_unpaired_loss(kto, like="kto", parameters={"beta": 0.1, "z": 0.0})
    >>> def swapped(logps, ref_logps, labels):
    ...     return kto(logps, ref_logps, ~labels)
    >>> check_unpaired_loss(swapped)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: monotone: the loss increases in the log-prob of completion 0, slope ...
    """
    named = isinstance(loss, str)
    if parameters is not None and not named and not isinstance(like, str):
        raise TypeError(OWN)
    function = _unpaired(loss, parameters) if isinstance(loss, str) else loss
    if isinstance(like, str):
        like = _unpaired(like, parameters)
    check_call(function, ("logps", "ref_logps", "labels"))
    claims = Claims(
        monotone="c" if monotone else "", couples_batch=couples_batch, step0=step0,
        bounds=limits(bounds), like=like, finite_up_to=finite_up_to,
    )  # fmt: skip
    subject = Subject(function, claims, others=("labels",), named=named, entry="completion")
    usual = UnpairedLogps(*_usual(16), torch.arange(16) % 3 == 0)
    _reads(subject, usual, ref_logps=lambda t: t + t.sin(), labels=lambda t: ~t)
    hypothesis()
    import hypothesis.strategies as st

    def single(drawn: tuple[PairLogps, int]) -> UnpairedLogps:
        case, bits = drawn
        return _single(case, torch.tensor([bits >> i & 1 for i in range(2 * len(case.logps))]))

    strategy = st.tuples(pair_logps(max_pairs=2), st.integers(0, 15)).map(single)
    run(
        subject,
        st.tuples(strategy, st.integers(1, 512), st.integers(0, 512)),
        examples,
        _unpaired_cases(finite_up_to),
        [only_the_ratio] if only_ratio else [],
    )


def check_list_loss(
    loss: Callable[..., Tensor] | str,
    *,
    like: Callable[..., Tensor] | str | None = None,
    needs_scores: bool = False,
    needs_counts: bool = False,
    only_margin: bool = False,
    only_ratio: bool = True,
    monotone: bool = False,
    any_order: bool = False,
    couples_batch: bool = False,
    step0: float | Callable[[int], float] | None = None,
    bounds: tuple[float | None, float | None] = (None, None),
    finite_up_to: float = 1e4,
    sizes: Sequence[int] = (2, 3, 5),
    parameters: Mapping[str, Any] | None = None,
    examples: int = 40,
) -> None:
    """Hold a loss of lists of completions (ranked, one chosen, or scored) to what it must satisfy.

    For every such loss what `check_loss_invariants` asks of a pair's, for K of ``sizes``. It reads
    the reference. What ``counts`` says is absent changes nothing and gets a gradient of exactly 0.

    Args:
        loss: called with ``(logps, ref_logps)``, (N, K) tensors, best first or chosen first, then
            ``scores`` (N, K) if ``needs_scores``, then ``counts`` (N,) int64 if ``needs_counts``;
            returns (N,) or their mean. Or a name that `list_loss` has, which brings its own flags.
        like: a loss that it must equal: a function called alike, or a name, with ``parameters``.
        needs_scores: it reads scores, and is passed them; then the order of the completions of a
            list is nothing.
        needs_counts: it reads ``counts``, and is passed them.
        only_margin: adding a number to all log-probs of a list changes nothing.
        only_ratio: it reads ``logps - ref_logps`` alone.
        monotone: never increasing in the log-prob of the first completion.
        any_order: the order of the completions behind the first is nothing.
        couples_batch: a list's gradient depends on the other ones.
        step0: its value at policy == reference, a number or a function of K; asked of full lists.
        bounds: lowest and highest value, either None.
        finite_up_to: largest |log-prob| and |log-ratio| at which it must be finite.
        sizes: K tried.
        parameters: of the named loss.
        examples: cases drawn.

    Raises:
        AssertionError: what does not hold, with a case to paste.
        TypeError: the loss cannot be called like that.

    >>> import math
    >>> def ranking(logps, ref_logps):
    ...     x = 0.1 * (logps - ref_logps)
    ...     return sum(torch.logsumexp(x[:, k:], 1) - x[:, k] for k in range(x.shape[1]))
    >>> check_list_loss(ranking, only_margin=True, monotone=True,
    ...                 step0=lambda K: math.log(math.factorial(K)))
    >>> check_list_loss(ranking, like="plackett_luce", parameters={"beta": 0.1})
    >>> check_list_loss(lambda x, ref: ranking(x, ref) / 2,
    ...                 like="plackett_luce")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: like: the loss of list 0 must be ..., found ...
    """
    named = isinstance(loss, str)
    if parameters is not None and not named and not isinstance(like, str):
        raise TypeError(OWN)
    if isinstance(loss, str):
        row = find_row(LISTWISE, loss)
        needs_scores, needs_counts = "alpha" in row.parameters, True
        only_margin = only_margin or loss != "nca"
        any_order = any_order or loss == "s_dpo"
        monotone = monotone or loss in ("plackett_luce", "s_dpo")
    others = ("scores",) * needs_scores + ("counts",) * needs_counts
    function = _listed(loss, parameters, others) if isinstance(loss, str) else loss
    if isinstance(like, str):
        like = _listed(like, parameters, others)
    check_call(function, ("logps", "ref_logps", *others))
    start: float | Callable[..., float] | None = step0
    if callable(step0):
        of_size = step0
        start = lambda case: of_size(case.logps.shape[1])  # noqa: E731
    claims = Claims(
        only_margin=only_margin, monotone="c" if monotone else "", couples_batch=couples_batch,
        step0=start, bounds=limits(bounds), like=like, finite_up_to=finite_up_to,
    )  # fmt: skip
    subject = Subject(function, claims, others=others, named=named, entry="list")
    usual = [t.reshape(16, 3) for t in _usual(48)]
    full = ListLogps(usual[0], usual[1], usual[0].flip(0) / 8, torch.full((16,), 3))
    moves: dict[str, Callable[[Tensor], Tensor]] = {"ref_logps": lambda t: t + t.sin()}
    if needs_scores:
        moves["scores"] = lambda t: t.flip(1)
    if needs_counts:
        moves["counts"] = lambda t: t - 1
    _reads(subject, full, **moves)
    checks: list[Callable[[Trial], None]] = [only_the_ratio] if only_ratio else []
    checks += [absent_is_not_read] if needs_counts else []
    checks += [order_is_nothing] if needs_scores or any_order else []
    ragged = needs_counts and step0 is None
    hypothesis()
    corpus = _list_cases(sizes, finite_up_to, ragged)
    run(subject, _lists(sizes, finite_up_to, ragged), examples, corpus, checks)


def _unpaired(name: str, parameters: Mapping[str, Any] | None) -> Callable[..., Tensor]:
    find_row(UNPAIRED, name)
    own = dict(parameters or {})

    def function(logps: Tensor, ref_logps: Tensor, labels: Tensor) -> Tensor:
        return unpaired_loss(logps, ref_logps, labels, loss=name, **own).per_example

    return function


def _listed(
    name: str, parameters: Mapping[str, Any] | None, others: tuple[str, ...]
) -> Callable[..., Tensor]:
    find_row(LISTWISE, name)
    own = dict(parameters or {})

    def function(logps: Tensor, ref_logps: Tensor, *given: Tensor) -> Tensor:
        fields = dict(zip(others, given, strict=True))
        return list_loss(logps, ref_logps, loss=name, **fields, **own).per_example

    return function


def _usual(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(count, generator=generator, dtype=torch.float64) * 30 - 1
    ref = logps + torch.randn(count, generator=generator, dtype=torch.float64)
    return logps, ref.clamp(max=-0.5)


def _reads(subject: Subject, case: Any, **moves: Callable[[Tensor], Tensor]) -> None:
    """Each input that a loss is passed changes it."""
    value = subject.values(case.logps, case).detach().clone()
    for name, move in moves.items():
        moved = subject.values(case.logps, case._replace(**{name: move(getattr(case, name))}))
        if torch.equal(value, moved):
            raise AssertionError(
                f"the loss does not read `{name}`: 16 {subject.entry}s keep their loss with others"
            )
    subject.check_first_call(value, case.logps, case)


def only_the_ratio(trial: Trial) -> None:
    """A number taken from a log-prob and from its reference changes nothing."""
    entries = torch.arange(trial.logps.numel()).reshape(trial.logps.shape) % 3
    less = trial.shift * entries.to(trial.logps.dtype)
    got = trial.moved(trial.logps - less, ref_logps=trial.case.ref_logps - less)
    _unmoved(trial, got, "only_ratio: the same number less in log-prob and reference")


def absent_is_not_read(trial: Trial) -> None:
    case = trial.case
    absent = torch.arange(case.logps.shape[1]) >= case.counts[:, None]
    if trial.gradient[absent].ne(0).any():
        raise trial.broken("the gradient of a completion beyond `counts` must be exactly 0")
    other = {
        name: torch.where(absent, getattr(case, name) * 1.5 - 100, getattr(case, name))
        for name in ("logps", "ref_logps", "scores")
    }
    if not torch.equal(trial.moved(other.pop("logps"), **other), trial.values):
        raise trial.broken("the loss reads completions beyond `counts`")


def order_is_nothing(trial: Trial) -> None:
    case = trial.case
    K = case.logps.shape[1]
    fixed = 0 if "scores" in trial.subject.others else 1  # the chosen one stays the first
    if (case.counts != K).any():
        return
    order = [*range(fixed), *reversed(range(fixed, K))]
    turned = {name: getattr(case, name)[:, order] for name in ("logps", "ref_logps", "scores")}
    got = trial.moved(turned.pop("logps"), **turned)
    _unmoved(trial, got, f"any_order: the order {order}")


def _unmoved(trial: Trial, got: Tensor, what: str) -> None:
    values = trial.values
    wrong = ~((got - values).abs() <= 1e-9 * (1 + values.abs())) & values.isfinite()
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise trial.broken(
            f"{what} moves the loss of {trial.subject.entry} {i} from {values[i].item():.9g} to "
            f"{got[i].item():.9g}"
        )


def _single(case: PairLogps, labels: Tensor) -> UnpairedLogps:
    return UnpairedLogps(case.logps.reshape(-1), case.ref_logps.reshape(-1), labels.bool())


def _unpaired_cases(finite_up_to: float) -> list[UnpairedLogps]:
    """The fixed cases of pairs, one completion after the other."""
    cases = []
    for k, case in enumerate(pair_cases(finite_up_to, lengths=False)):
        whole = _single(case, torch.arange(case.logps.numel()) // (1 + k % 3) % 2 == 0)
        if k < 5:  # N = 1 to 5
            whole = UnpairedLogps(*(t[: k + 1] for t in whole))
        cases.append(whole)
        if k > 5:
            cases.append(whole._replace(labels=~whole.labels))
    usual = cases[3]
    for label in (True, False):
        cases.append(usual._replace(labels=torch.full_like(usual.labels, label)))
        cases.append(UnpairedLogps(usual.logps[:1], usual.ref_logps[:1], torch.tensor([label])))
    return cases


def _list_cases(sizes: Sequence[int], finite_up_to: float, ragged: bool) -> list[ListLogps]:
    """The fixed cases of pairs, K completions after one another make a list."""
    generator = np.random.default_rng(0)
    cases = []
    for K in sizes:
        for k, case in enumerate(pair_cases(finite_up_to, lengths=False)):
            flat = [t.reshape(-1) for t in case[:2]]
            N = k + 1 if k < 5 else max(len(flat[0]) // K, 1)
            at = torch.arange(N * K) % len(flat[0])
            logps, ref = (t[at].reshape(N, K).clone() for t in flat)
            scores = torch.from_numpy(np.round(generator.normal(size=(N, K)) * 2 * GRID) / GRID)
            counts = torch.full((N,), K)
            if ragged and k % 2:
                counts = torch.from_numpy(generator.integers(2, K + 1, N))
            cases.append(ListLogps(logps, ref, scores, counts))
    return cases


def _lists(
    sizes: Sequence[int], finite_up_to: float, ragged: bool
) -> SearchStrategy[tuple[ListLogps, int, int]]:
    import hypothesis.strategies as st

    far = int(min(finite_up_to, 1e4) * GRID)
    near = min(100 * GRID, far)

    @st.composite
    def build(draw: Any) -> ListLogps:
        N, K = draw(st.integers(1, 3)), draw(st.sampled_from(list(sizes)))
        reach = draw(st.sampled_from([near, near, far]))

        def numbers(top: int, low: int) -> Tensor:
            entry = st.integers(0, top - low)
            rows = [[top - draw(entry) for _ in range(K)] for _ in range(N)]
            return torch.tensor(rows, dtype=torch.float64) / GRID

        logps = numbers(-1, -reach)
        ref = logps.clone() if draw(st.integers(0, 4)) == 4 else numbers(-1, -reach)
        scores = numbers(4 * GRID, -4 * GRID)
        counts = [draw(st.integers(2, K)) if ragged else K for _ in range(N)]
        return ListLogps(logps, ref, scores, torch.tensor(counts))

    return st.tuples(build(), st.integers(1, 512), st.integers(0, 512))
