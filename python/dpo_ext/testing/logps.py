"""`check_logps`: functions that score sequences against the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_ext.layout.table import ScoreTable
from dpo_ext.testing.search import Violation, hypothesis, literal, search
from dpo_ext.testing.strategies import logits, score_tables

TOKEN_SLACK = 4e-6  # nats a token in float32, against float64
CANARY = float("nan")


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
    Drawn: flat, peaked, offset (3e4), +-1e4 and -inf logits, odd vocabularies, sequences without a
        token,
    targets of -100, weights of 0, rows in any order, NaN in the rows that nothing scores, a random
    upstream. Exactly 0 must be: a sequence without a token, the gradient of a row that nothing
    scores, every gradient for an upstream of 0. A row's gradient adds up to 0, and a second call
    has the bits of the first.

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
        return st.tuples(st.just(values), tables, st.integers(0, 2**16))

    search(
        lambda case: _check_scores(function, *case, dtype=dtype, token_slack=token_slack),
        logits().flatmap(with_table),
        examples,
    )


def _check_scores(
    function: Callable[[Tensor, ScoreTable], Tensor],
    values: Tensor,
    table: ScoreTable,
    seed: int,
    *,
    dtype: torch.dtype,
    token_slack: float,
) -> None:
    values = values.to(dtype)
    used = table.logit_rows[table.targets != -100]
    if table.weights is not None:
        used = table.logit_rows[(table.targets != -100) & (table.weights != 0)]
    spare = torch.ones(len(values), dtype=torch.bool)
    spare[used] = False
    values = values.clone()
    values[spare] = CANARY  # a row that nothing scores is never read
    upstream = 2.0 ** torch.tensor(
        np.random.default_rng(seed).integers(-2, 3, len(table.seq_offsets) - 1)
    )

    def broken(what: str) -> Violation:
        lines = [
            what, "", "import torch", "from dpo_ext.torch import ScoreTable",
            "nan, inf = float('nan'), float('inf')",
            literal("logits", values), *_table_literal(table), "function(logits, table)",
        ]  # fmt: skip
        return Violation("\n".join(lines))

    leaf = values.clone().requires_grad_()
    scored = bool((table.targets != -100).any())
    try:
        got = function(leaf, table)
    except Exception as error:
        raise broken(f"the function raised {type(error).__name__}: {error}") from error
    if not isinstance(got, Tensor) or got.numel() != len(upstream):
        raise broken(f"the function must return {len(upstream)} log-probs")
    flat = got.reshape(-1)
    if not torch.equal(leaf.detach().nan_to_num(nan=7.5), values.nan_to_num(nan=7.5)):
        raise broken("the function changes the logits in place")
    want, gradient, tokens = definition(values, table, upstream)
    for i, (ours, truth) in enumerate(zip(flat.tolist(), want.tolist(), strict=True)):
        slack = token_slack * max(int(tokens[i]), 1) + 2.0**-22 * abs(truth)
        if not (ours == truth or abs(ours - truth) <= slack):
            raise broken(f"the log-prob of sequence {i} must be {truth!r}, found {ours!r}")
        if not int(tokens[i]) and ours != 0:
            raise broken(f"sequence {i} has no scored token: it must be exactly 0, found {ours!r}")
    if not flat.requires_grad:
        if scored:
            raise broken("the log-probs have no gradient")
        return
    (grad,) = torch.autograd.grad(flat, leaf, upstream.to(flat.dtype))
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    excess = (grad.double() - gradient).abs() - rounding * gradient.abs()
    outside = ~(excess <= 1e-5 * upstream.abs().max()) & gradient.isfinite()
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise broken(
            f"the gradient of row {row}, column {column} must be "
            f"{gradient[row, column].item():.9g}, found {grad[row, column].item():.9g} (upstream "
            f"{upstream.tolist()})"
        )
    for row in spare.nonzero()[:, 0].tolist():
        if grad[row].any() or grad[row].isnan().any():
            raise broken(f"the gradient of row {row} must be exactly 0: nothing scores it")
    if dtype not in (torch.bfloat16, torch.float16):
        drift = grad.double().sum(1).abs()
        moved = ~(drift <= 4e-6 * gradient.abs().sum(1) + 2e-6 * upstream.abs().max())
        moved &= gradient.isfinite().all(1)
        if moved.any():
            row = int(moved.nonzero()[0])
            raise broken(
                f"the gradient of row {row} must add up to 0 over the vocabulary, found "
                f"{drift[row].item():.3g}"
            )
    again = values.clone().requires_grad_()
    repeated = function(again, table).reshape(-1)
    if not torch.equal(repeated.detach().nan_to_num(7.5), flat.detach().nan_to_num(7.5)):
        raise broken("the same logits must give the same bits: the function is random")
    (nothing,) = torch.autograd.grad(repeated, again, torch.zeros_like(repeated))
    if nothing.isnan().any() or nothing.any():
        raise broken("an upstream gradient of 0 must give exactly 0")


def definition(
    values: Tensor, table: ScoreTable, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (S,), gradient (R, V) and scored tokens (S,), in float64, one token at a time."""
    z = values.double()
    offsets = table.seq_offsets.tolist()
    logps = torch.zeros(len(offsets) - 1, dtype=torch.float64)
    tokens = torch.zeros(len(offsets) - 1, dtype=torch.int64)
    gradient = torch.zeros_like(z)
    for sequence in range(len(logps)):
        for token in range(offsets[sequence], offsets[sequence + 1]):
            row, target = int(table.logit_rows[token]), int(table.targets[token])
            weight = 1.0 if table.weights is None else float(table.weights[token])
            if target == -100 or weight == 0:
                continue
            top = z[row].max()
            mass = torch.exp(z[row] - top)
            logps[sequence] += weight * ((z[row, target] - top) - torch.log(mass.sum()))
            tokens[sequence] += 1
            onehot = torch.zeros_like(mass)
            onehot[target] = 1
            gradient[row] += weight * upstream[sequence].double() * (onehot - mass / mass.sum())
    return logps, gradient, tokens


def _table_literal(table: ScoreTable) -> list[str]:
    weights = "None" if table.weights is None else str(table.weights.tolist())
    return [
        f"table = ScoreTable(logit_rows={table.logit_rows.tolist()}, "
        f"targets={table.targets.tolist()},",
        f"                   seq_offsets={table.seq_offsets.tolist()}, weights={weights})",
    ]
