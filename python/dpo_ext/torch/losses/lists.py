"""Losses of lists of completions: Plackett-Luce, S-DPO, InfoNCA, NCA.

As in the table of pairs the gradients are in closed form. N lists of K completions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.losses.checks import (
    bind_parameters,
    check_count,
    check_is_number,
    check_pair_of,
    check_weight,
)
from dpo_ext.torch.losses.forms import s, sp
from dpo_ext.torch.losses.node import attach, weighted_sum
from dpo_ext.torch.losses.result import GroupLoss
from dpo_ext.torch.losses.row import LossRow, find_row, plain_row, positive
from dpo_ext.torch.numbers import host_values

LISTWISE: dict[str, LossRow] = {}
"""Losses of `list_loss`: formulas of ``(beta*x, scores, present, parameters) -> L,
dL/d(beta*x)``.
"""


@plain_row(
    LISTWISE,
    "-sum_k log softmax(x[k:])[0], best first",
    "2305.18290, app. A.3",
    needs="reference",
    beta=positive(0.1),
)
def plackett_luce(x, scores, present):
    # log sum exp of every suffix, from the back; a completion that is absent is -inf and drops out
    suffix = torch.flip(torch.logcumsumexp(torch.flip(x, (1,)), 1), (1,))
    zero = torch.zeros_like(x)
    loss = torch.where(present, suffix - x, zero).sum(1)
    # sum over k <= j of softmax(x[k:])_j
    share = torch.exp(x + torch.logcumsumexp(torch.where(present, -suffix, zero), 1))
    return loss, torch.where(present, share - 1, zero)


@plain_row(
    LISTWISE,
    "sp(log sum_l>0 exp(x_l - x_0)), the first is chosen",
    "2406.09215",
    needs="reference",
    beta=positive(0.1),
)
def s_dpo(x, scores, present):
    others = x[:, 1:]
    u = torch.logsumexp(others, 1) - x[:, 0]
    push = s(u)
    return sp(u), torch.cat((-push[:, None], push[:, None] * torch.softmax(others, 1)), 1)


@plain_row(
    LISTWISE,
    "-sum_k q_k*log softmax(x)_k, q = softmax(score/alpha)",
    "2402.05369",
    needs="reference",
    beta=positive(0.1),
    alpha=positive(1.0),
)
def infonca(x, scores, present):
    zero = torch.zeros_like(x)
    loss = -torch.where(present, scores * torch.log_softmax(x, 1), zero).sum(1)
    return loss, torch.softmax(x, 1) - scores


@plain_row(
    LISTWISE,
    "sum_k (q_k*sp(-x_k) + sp(x_k)/K), q = softmax(score/alpha)",
    "2402.05369",
    needs="reference",
    beta=positive(0.1),
    alpha=positive(1.0),
)
def nca(x, scores, present):
    zero = torch.zeros_like(x)
    share = 1 / present.sum(1, keepdim=True).to(x.dtype)
    loss = torch.where(present, scores * sp(-x) + share * sp(x), zero).sum(1)
    return loss, torch.where(present, share * s(x) - scores * s(-x), zero)


def list_loss(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor | None = None,
    *,
    loss: str = "plackett_luce",
    counts: Tensor | None = None,
    beta: Any = None,
    weight: Any = None,
    num_lists: float | Tensor | None = None,
    **params: Any,
) -> GroupLoss:
    """Loss of lists of completions of one prompt: ranked, with one chosen, or scored.

    Same as, for ``loss="plackett_luce"``, with ``x = beta * (logps - ref_logps)``::

        loss = mean over lists of  sum_k (logsumexp(x[k:]) - x[k])

    Rafailov et al. 2023, arXiv:2305.18290, app. A.3. ``"s_dpo"`` arXiv:2406.09215 (the first
    completion is chosen); ``"infonca"`` and ``"nca"`` arXiv:2402.05369 (scores).

    Args:
        logps: (N, K) float32 or float64; the ranking, best first, for ``"plackett_luce"``.
        ref_logps: (N, K), same dtype; no gradient.
        scores: (N, K), for ``"infonca"`` and ``"nca"`` alone.
        loss: ``"plackett_luce"``, ``"s_dpo"``, ``"infonca"`` or ``"nca"``.
        counts: (N,) completions of each list, 2..K, the others are not read; None is K for all.
        beta: > 0, a float or (N,).
        weight: >= 0, (N,).
        num_lists: replaces N in the mean.
        **params: ``alpha`` of the scored losses.

    Returns:
        GroupLoss: with ``rewards`` (N, K).

    Raises:
        TensorError: wrong shapes, dtypes or devices, scores missing or not used.
        ValueError: unknown loss, missing or unknown parameter.

    >>> from torch import zeros
    >>> list_loss(zeros(1, 3) - 5, zeros(1, 3) - 5).loss     # log 3! rankings
    tensor(1.7918)
    """
    row = find_row(LISTWISE, loss)
    check_pair_of("logps", logps, ref_logps, 2)
    N, K = logps.shape
    if K < 2:
        raise TensorError(f"`logps` must have at least 2 completions a list, found {K}")
    present = torch.ones_like(logps, dtype=torch.bool)
    if counts is not None:
        if counts.shape != (N,) or counts.is_floating_point():
            raise TensorError(
                f"`counts` must be integers of shape ({N},), found {describe(counts)}"
            )
        if host_values(counts) and not bool(((counts >= 2) & (counts <= K)).all()):
            raise TensorError(f"`counts` must be in 2..{K}, found {counts.tolist()}")
        present = torch.arange(K, device=logps.device) < counts[:, None]
    scored = "alpha" in row.parameters
    if scored != (scores is not None):
        raise TensorError(f"`scores` {'is missing' if scored else 'is not read'}: loss {loss!r}")
    given = params if beta is None else {"beta": beta, **params}
    bound = bind_parameters(row, given, logps[:, 0])
    divisor: float | Tensor = max(N, 1)
    if num_lists is not None:
        divisor = check_count("num_lists", num_lists)
    factor = None if weight is None else check_weight(weight, logps)
    beta_, alpha = _column(bound.pop("beta")), _column(bound.pop("alpha", 1.0))
    with torch.no_grad():
        absent = logps.new_full((), -float("inf"))
        rewards = beta_ * (logps - ref_logps)
        x = torch.where(present, rewards, absent)
        q = None
        if scores is not None:
            if scores.shape != logps.shape or scores.device != logps.device:
                raise TensorError(f"`scores` must be of shape ({N}, {K}), found {describe(scores)}")
            q = torch.softmax(torch.where(present, scores.to(logps.dtype) / alpha, absent), 1)
        value, slope = row.formula(x, q, present)
        slope = beta_ * slope
    per_list = attach(logps, value, slope)
    total = weighted_sum(per_list, factor) / divisor
    check_is_number(total, value, logps)
    return GroupLoss(total, per_list, rewards)


def _column(value: Any) -> Any:
    return value[:, None] if isinstance(value, Tensor) else value
