"""`check_logps`: functions that score sequences against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_ext.layout.table import ScoreTable
from dpo_ext.testing.corpus import FORMS, Scored, logit_cases
from dpo_ext.testing.search import Violation, hypothesis, literal, search, version_of
from dpo_ext.testing.strategies import logits, score_tables

TOKEN_SLACK = 4e-6  # nats a token in float32, against float64
CANARY = float("nan")
# One of either sign, with the scale of a loss in half precision; then what float16 can hold.
FAR_UPSTREAM = ((-(2.0**16), 2.0**-16), (-(2.0**10), 2.0**-2))


def check_logps(
    function: Callable[[Tensor, ScoreTable], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    token_slack: float = TOKEN_SLACK,
    weighted: bool = True,
    examples: int = 80,
) -> None:
    """Hold a function that scores sequences to the definition in float64, forward and backward.

    The definition: the log-prob of a sequence is the weighted sum over its scored tokens of
    ``(z_y - max z) - log sum exp(z - max z)``, and its gradient by a row ``weight * (onehot -
    softmax)``.
    Fixed: vocabularies of 1 to 4099 with the maximum first, last and behind 1024 columns of -inf;
    logits that are rows, columns or a tail of a larger buffer; weights of -1, 0 and 3; sequences of
    0, 1 and 10^5 tokens. Then drawn: flat, peaked, offset (3e4), +-1e4 and -inf logits, odd
    vocabularies, sequences without a token, targets of -100, rows in any order, NaN in the rows
    that nothing scores, an upstream of either sign. Exactly 0 must be: a sequence without a token,
    the gradient of a row that nothing scores, every gradient for an upstream of 0. A row's gradient
    adds up to 0, a second call has the bits of the first, also in a buffer that held other logits,
    and logits and table are left as they were.

    Args:
        function: ``(logits (R, V), table: ScoreTable) -> (S,) or (S / 2, 2)`` log-probs,
            differentiable in the logits.
        dtype: of the logits; the definition reads the values as rounded to it.
        token_slack: allowed error a token, nats, beside a relative error of 2^-22 of the sum; half
            precision logits need no more, because their values are exact in float32.
        weighted: whether the tables have weights.
        examples: cases drawn.

    Raises:
        AssertionError: with the smallest case found.

    >>> from dpo_ext.torch import sequence_logps
    >>> check_logps(sequence_logps)

    >>> def shifted(logits, table):  # every row one too late
    ...     rows = (table.logit_rows + 1) % len(logits)
    ...     offsets = table.seq_offsets
    ...     moved = ScoreTable(logit_rows=rows, targets=table.targets, seq_offsets=offsets)
    ...     return sequence_logps(logits, moved)
    >>> check_logps(shifted, weighted=False)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: the log-prob of sequence ... must be ...
    """
    hypothesis()
    import hypothesis.strategies as st

    def with_table(values: Tensor) -> Any:
        tables = score_tables(*values.shape, weighted=weighted)
        forms = st.sampled_from((*FORMS[:1] * 4, *FORMS))
        return st.builds(Scored, st.just(values), tables, st.integers(0, 2**16), forms)

    search(
        lambda case: _check_scores(function, case, dtype=dtype, token_slack=token_slack),
        logits().flatmap(with_table),
        examples,
        logit_cases(weighted=weighted),
    )


def _placed(values: Tensor, form: str) -> Tensor:
    """A fresh copy of the logits, with the strides of a form, NaN around them."""
    R, V = values.shape
    nan = float("nan")
    if form == "contiguous":
        return values.clone()
    if form == "columns first":
        return values.t().contiguous().t()
    if form == "offset":
        return torch.cat((values.new_full((5,), nan), values.reshape(-1)))[5:].reshape(R, V)
    if form == "every second column":
        buffer = values.new_full((R, 2 * V), nan)
        view = buffer[:, ::2]
    else:
        buffer = values.new_full((R + 2, V + 3), nan)
        view = buffer[1 : R + 1, 2 : V + 2]
    view.copy_(values)
    return view


PLACED = {
    "contiguous": [],
    "rows of a larger buffer": [
        "R, V = logits.shape", "buffer = torch.full((R + 2, V + 3), nan, dtype=logits.dtype)",
        "logits = buffer[1 : R + 1, 2 : V + 2].copy_(logits)",
    ],
    "every second column": [
        "R, V = logits.shape", "buffer = torch.full((R, 2 * V), nan, dtype=logits.dtype)",
        "logits = buffer[:, ::2].copy_(logits)",
    ],
    "columns first": ["logits = logits.t().contiguous().t()"],
    "offset": [
        "buffer = torch.cat((logits.new_full((5,), nan), logits.reshape(-1)))",
        "logits = buffer[5:].reshape(logits.shape)",
    ],
}  # fmt: skip


def _check_scores(
    function: Callable[[Tensor, ScoreTable], Tensor],
    case: Scored,
    *,
    dtype: torch.dtype,
    token_slack: float,
) -> None:
    values, table, seed, form, source = case
    values = values.to(dtype)
    used = table.logit_rows[table.targets != -100]
    if table.weights is not None:
        used = table.logit_rows[(table.targets != -100) & (table.weights != 0)]
    spare = torch.ones(len(values), dtype=torch.bool)
    spare[used] = False
    values = values.clone()
    values[spare] = CANARY  # a row that nothing scores is never read
    generator = np.random.default_rng(seed)
    upstream = 2.0 ** torch.tensor(generator.integers(-2, 3, table.n_sequences))
    upstream *= torch.tensor(generator.choice([-1.0, 1.0], table.n_sequences))

    def broken(what: str) -> Violation:
        lines = [
            what, "", "import torch", "from torch import arange",
            "from dpo_ext.torch import ScoreTable", "nan, inf = float('nan'), float('inf')",
        ]  # fmt: skip
        if source is None:
            lines += [literal("logits", values), *_table_literal(table)]
        else:
            lines += [f"logits = ({source[0]}).to({dtype})", f"table = {source[1]}"]
            lines += [f"logits[{spare.nonzero()[:, 0].tolist()}] = nan"] if spare.any() else []
        return Violation("\n".join([*lines, *PLACED[form], "function(logits, table)"]))

    fields = ("logit_rows", "targets", "seq_offsets", "weights")
    parts = {name: getattr(table, name) for name in fields if getattr(table, name) is not None}
    kept = {name: (t, t.clone()) for name, t in parts.items()}
    given_last: list[tuple[Tensor, int]] = []

    def check_given() -> None:
        for given, version in given_last:
            if version_of(given) != version or not _equal(given.detach(), values):
                raise broken("the function changes the logits in place")
        for name, (part, was) in kept.items():
            if version_of(part) != versions[name] or not torch.equal(part, was):
                part.copy_(was)
                raise broken(f"the function changes `table.{name}` in place")

    versions = {name: version_of(t) for name, t in parts.items()}

    def call(given: Tensor) -> Tensor:
        given_last[:] = [(given, version_of(given))]
        fault = None
        try:
            got = function(given, table)
        except Exception as error:
            fault = error
        check_given()
        if fault is not None:
            raise broken(f"the function raised {type(fault).__name__}: {fault}") from fault
        if not isinstance(got, Tensor) or got.numel() != len(upstream):
            raise broken(f"the function must return {len(upstream)} log-probs")
        return got.reshape(-1)

    def pull(flat: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor:
        try:
            (grad,) = torch.autograd.grad(flat, leaf, upstream.to(flat.dtype))
        except RuntimeError as error:
            raise broken(f"the gradient raised RuntimeError: {error}") from error
        check_given()
        return grad

    scored = bool((table.targets != -100).any())
    want, gradient, tokens = definition(values, table, upstream)

    def compare(flat: Tensor) -> None:
        for i, (ours, truth) in enumerate(zip(flat.tolist(), want.tolist(), strict=True)):
            slack = token_slack * largest * max(int(tokens[i]), 1) + 2.0**-22 * abs(truth)
            if not (ours == truth or abs(ours - truth) <= slack):
                raise broken(f"the log-prob of sequence {i} must be {truth!r}, found {ours!r}")
            if not int(tokens[i]) and ours != 0:
                raise broken(
                    f"sequence {i} has no scored token: it must be exactly 0, found {ours!r}"
                )

    largest = 1.0
    if table.weights is not None and table.n_tokens:
        largest = max(1.0, table.weights.abs().max().item())
    with torch.no_grad():  # first, so that a write to the logits is seen as one
        compare(call(_placed(values, form)))
    leaf = _placed(values, form).requires_grad_()
    flat = call(leaf if form != "contiguous" else leaf.clone())
    compare(flat)
    if not flat.requires_grad:
        if scored:
            raise broken("the log-probs have no gradient")
        return
    grad = pull(flat, leaf, upstream)
    earlier = flat.detach().clone(), grad.clone()
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    excess = (grad.double() - gradient).abs() - rounding * gradient.abs()
    outside = ~(excess <= 1e-5 * largest * upstream.abs().max()) & gradient.isfinite()
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise broken(
            f"the gradient of row {row}, column {column} must be "
            f"{gradient[row, column].item():.9g}, found {grad[row, column].item():.9g} (upstream "
            f"{upstream.tolist()})"
        )
    if grad[spare].any() or grad[spare].isnan().any():
        row = int((spare & (grad != 0).any(1)).nonzero()[0])
        raise broken(f"the gradient of row {row} must be exactly 0: nothing scores it")
    if dtype not in (torch.bfloat16, torch.float16):
        drift = grad.double().sum(1).abs()
        moved = ~(drift <= 4e-6 * gradient.abs().sum(1) + 2e-6 * largest * upstream.abs().max())
        moved &= gradient.isfinite().all(1)
        if moved.any():
            row = int(moved.nonzero()[0])
            raise broken(
                f"the gradient of row {row} must add up to 0 over the vocabulary, found "
                f"{drift[row].item():.3g}"
            )
    again = _placed(values, form).requires_grad_()
    repeated = call(again)
    if not _equal(repeated.detach(), flat.detach()):
        raise broken("the same logits must give the same bits: the function is random")
    nothing = pull(repeated, again, torch.zeros_like(repeated))
    if nothing.isnan().any() or nothing.any():
        raise broken("an upstream gradient of 0 must give exactly 0")
    ones = definition(values, table, torch.ones_like(upstream))[1]
    for factor in FAR_UPSTREAM[dtype == torch.float16]:
        again = _placed(values, form).requires_grad_()
        flat_again = call(again)
        function(_placed(values.flip(1), form).requires_grad_(), table)  # a later call is nothing
        got = pull(flat_again, again, upstream.new_full((1,), factor).expand(len(upstream)))
        excess = (got.double() / factor - ones).abs() - rounding * ones.abs()
        if (~(excess <= 1e-5 * largest) & ones.isfinite()).any():
            raise broken(
                f"the gradient for an upstream of {factor:g} for all (stride 0), taken after a "
                "call with other logits, is wrong"
            )
    with torch.no_grad():
        buffer = _placed(values.flip(1) if values.shape[1] > 1 else values + 1, form)
        function(buffer, table)
        if not (_equal(flat.detach(), earlier[0]) and _equal(grad, earlier[1])):
            raise broken("the log-probs or the gradient of a call change with a later call")
        buffer.copy_(values)
        if not _equal(call(buffer), flat.detach()):
            compare(call(buffer))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def definition(
    values: Tensor, table: ScoreTable, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (S,), gradient (R, V) and scored tokens (S,), in float64."""
    z = values.double()
    offsets = table.seq_offsets.long()
    counts = offsets[1:] - offsets[:-1]
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    weight = torch.ones(len(sequence)) if table.weights is None else table.weights
    kept = (table.targets != -100) & (weight != 0)
    sequence, weight = sequence[kept], weight[kept].double()
    rows, targets = table.logit_rows[kept], table.targets[kept].long()[:, None]
    shifted = z[rows] - z[rows].amax(1, keepdim=True)
    mass = shifted.exp()
    total = mass.sum(1)
    logps = torch.zeros(len(counts), dtype=torch.float64)
    logps.index_add_(0, sequence, weight * (shifted.gather(1, targets)[:, 0] - total.log()))
    onehot = torch.zeros_like(mass).scatter_(1, targets, 1)
    pull = (weight * upstream[sequence].double())[:, None]
    gradient = torch.zeros_like(z).index_add_(0, rows, pull * (onehot - mass / total[:, None]))
    return logps, gradient, torch.bincount(sequence, minlength=len(counts))


def _table_literal(table: ScoreTable) -> list[str]:
    weights = "None" if table.weights is None else str(table.weights.tolist())
    return [
        f"table = ScoreTable(logit_rows={table.logit_rows.tolist()}, "
        f"targets={table.targets.tolist()},",
        f"                   seq_offsets={table.seq_offsets.tolist()}, weights={weights})",
    ]
