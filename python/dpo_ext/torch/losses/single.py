"""Losses of single labelled completions (KTO, BCO, APO) and of lists (Plackett-Luce, S-DPO,
InfoNCA, NCA).

As in the table of pairs the gradients are in closed form. Letters: N examples or lists, K
completions of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.losses.checks import (
    _check_pair_of,
    _find,
    bind_parameters,
    host_values,
)
from dpo_ext.torch.losses.forms import ds, s, sp
from dpo_ext.torch.losses.node import _finish
from dpo_ext.torch.losses.ranks import check_group, check_parts, mean_over
from dpo_ext.torch.losses.result import GroupLoss
from dpo_ext.torch.losses.row import LossRow, finite, non_negative, positive

UNPAIRED: dict[str, LossRow] = {}
"""Losses of `unpaired_loss`: formulas of ``(x, is desirable, parameters) -> L, dL/dx``."""
LISTWISE: dict[str, LossRow] = {}
"""Losses of `list_loss`: formulas of ``(beta*x, scores, present, parameters) -> L,
dL/d(beta*x)``.
"""


def _row(table: dict[str, LossRow], name: str, text: str, paper: str, **parameters: Any) -> Any:
    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        table[name] = LossRow(name, formula, text, paper, parameters)
        return formula

    return register


@_row(
    UNPAIRED, "kto", "lam_d*s(-beta*(x - z)) desirable, lam_u*s(beta*(x - z)) not",
    "2402.01306, eq. 7",
    beta=positive(0.1), z=finite(), lam_d=non_negative(1.0), lam_u=non_negative(1.0),
)  # fmt: skip
def _(x, good, beta, z, lam_d, lam_u):
    a = beta * (x - z)
    slope = beta * ds(a)
    return torch.where(good, lam_d * s(-a), lam_u * s(a)), torch.where(
        good, -lam_d * slope, lam_u * slope
    )


@_row(
    UNPAIRED, "bco", "sp(-(beta*x - delta)) desirable, sp(beta*x - delta) not", "2404.04656",
    beta=positive(0.1), delta=finite(),
)  # fmt: skip
def _(x, good, beta, delta):
    a = beta * x - delta
    return torch.where(good, sp(-a), sp(a)), torch.where(good, -beta * s(-a), beta * s(a))


@_row(
    UNPAIRED,
    "apo_zero_unpaired",
    "s(-beta*x) desirable, s(beta*x) not",
    "2408.06266",
    beta=positive(0.1),
)
def _(x, good, beta):
    a = beta * x
    slope = beta * ds(a)
    return torch.where(good, s(-a), s(a)), torch.where(good, -slope, slope)


def _log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, 1)


@_row(
    LISTWISE, "plackett_luce", "-sum_k log softmax(x[k:])[0], best first", "2305.18290, app. A.3",
    beta=positive(0.1),
)  # fmt: skip
def _(x, scores, present):
    # log sum exp of every suffix, from the back; a completion that is absent is -inf and drops out
    suffix = torch.flip(torch.logcumsumexp(torch.flip(x, (1,)), 1), (1,))
    zero = torch.zeros_like(x)
    loss = torch.where(present, suffix - x, zero).sum(1)
    # sum over k <= j of softmax(x[k:])_j
    share = torch.exp(x + torch.logcumsumexp(torch.where(present, -suffix, zero), 1))
    return loss, torch.where(present, share - 1, zero)


@_row(
    LISTWISE, "s_dpo", "sp(log sum_l>0 exp(x_l - x_0)), the first is chosen", "2406.09215",
    beta=positive(0.1),
)  # fmt: skip
def _(x, scores, present):
    others = x[:, 1:]
    u = torch.logsumexp(others, 1) - x[:, 0]
    push = s(u)
    return sp(u), torch.cat((-push[:, None], push[:, None] * torch.softmax(others, 1)), 1)


@_row(
    LISTWISE, "infonca", "-sum_k q_k*log softmax(x)_k, q = softmax(score/alpha)", "2402.05369",
    beta=positive(0.1), alpha=positive(1.0),
)  # fmt: skip
def _(x, scores, present):
    zero = torch.zeros_like(x)
    loss = -torch.where(present, scores * _log_softmax(x), zero).sum(1)
    return loss, torch.softmax(x, 1) - scores


@_row(
    LISTWISE, "nca", "sum_k (q_k*sp(-x_k) + sp(x_k)/K), q = softmax(score/alpha)", "2402.05369",
    beta=positive(0.1), alpha=positive(1.0),
)  # fmt: skip
def _(x, scores, present):
    zero = torch.zeros_like(x)
    share = 1 / present.sum(1, keepdim=True).to(x.dtype)
    loss = torch.where(present, scores * sp(-x) + share * sp(x), zero).sum(1)
    return loss, torch.where(present, share * s(x) - scores * s(-x), zero)


def unpaired_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    loss: str = "kto",
    beta: Any = None,
    weight: Any = None,
    num_examples: float | Tensor | None = None,
    **params: Any,
) -> GroupLoss:
    """Loss of single completions, each labelled desirable or not.

    Same as, for ``loss="kto"``::

        a = beta * (logps - ref_logps - z)
        loss = where(labels, lam_d * sigmoid(-a), lam_u * sigmoid(a)).mean()

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7; ``"bco"`` arXiv:2404.04656;
    ``"apo_zero_unpaired"`` arXiv:2408.06266. The shared numbers ``z`` (KTO: the mean log-ratio of
    mismatched pairs, see `kto_z`) and ``delta`` (BCO: the running mean of the rewards) are the
    caller's and carry no gradient.

    Args:
        logps: (N,) float32 or float64, summed over the completion's tokens.
        ref_logps: (N,), same dtype; no gradient.
        labels: (N,) bool, or 0 and 1; 1 is desirable.
        loss: ``"kto"``, ``"bco"`` or ``"apo_zero_unpaired"``.
        beta: > 0, a float or (N,).
        weight: >= 0, (N,).
        num_examples: replaces N in the mean: the examples of the whole step.
        **params: ``z``, ``lam_d``, ``lam_u`` of KTO, ``delta`` of BCO.

    Returns:
        GroupLoss.

    Raises:
        TensorError: wrong shapes, dtypes or devices.
        ValueError: unknown loss, missing or unknown parameter.

    >>> from torch import tensor
    >>> out = unpaired_loss(tensor([-9.0, -5.0]), tensor([-9.0, -5.0]), tensor([1, 0]), z=0.0)
    >>> out.loss
    tensor(0.5000)
    """
    row = _find(UNPAIRED, loss)
    _check_pair_of("logps", logps, ref_logps, 1)
    if labels.shape != logps.shape or labels.is_complex() or labels.device != logps.device:
        raise TensorError(
            f"`labels` must be of shape {tuple(logps.shape)} on {logps.device}, found "
            f"{describe(labels)}"
        )
    if host_values(labels) and not bool(((labels == 0) | (labels == 1)).all()):
        raise TensorError("`labels` must be 0 or 1")
    bound = bind_parameters(row, beta, params, logps)
    with torch.no_grad():
        x = logps - ref_logps
        value, slope = row.formula(x, labels != 0, **bound)
    return _finish(logps, value, slope, x * bound["beta"], weight, num_examples)


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
    row = _find(LISTWISE, loss)
    _check_pair_of("logps", logps, ref_logps, 2)
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
    bound = bind_parameters(row, beta, params, logps[:, 0])
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
    return _finish(logps, value, slope, rewards, weight, num_lists)


def kto_z(mismatched_logps: Tensor, mismatched_ref_logps: Tensor, *, group: Any = None) -> Tensor:
    """KTO's ``z``: the mean log-ratio of completions under prompts that are not theirs, at least 0.

    An estimate of KL(policy, reference), detached.

    Args:
        mismatched_logps: (N,) float32 or float64, summed over the completion's tokens.
        mismatched_ref_logps: (N,), same dtype; no gradient.
        group: process group whose ranks hold parts of the batch; the mean is over all of theirs.
            ``"local"``: of this rank alone.

    Returns:
        Tensor: a scalar for ``unpaired_loss(..., z=z)`` or ``loss="kto_pair_z"``.

    Raises:
        TensorError: wrong shapes, dtypes or devices.
        ValueError: there are several ranks and no ``group``.

    >>> kto_z(torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -5.0]))
    tensor(1.5000)
    """
    _check_pair_of("mismatched_logps", mismatched_logps, mismatched_ref_logps, 1)
    check_parts("`kto_z`", "is a mean over the batch", group)
    ratios = mismatched_logps.detach() - mismatched_ref_logps
    return mean_over(ratios, check_group(group)).clamp(min=0).to(ratios.dtype)


class RunningMean:
    """BCO's ``delta``: the mean over steps of the mean reward, this step included.

    Args:
        group: process group whose ranks hold parts of each step's rewards; ``"local"``: this rank's
            rewards alone.

    Attributes:
        steps, mean: what is kept; save and set them to go on after a restart.

    Raises:
        ValueError: at `update`, there are several ranks and no ``group``.

    >>> delta = RunningMean()
    >>> delta.update(torch.tensor([1.0, 3.0])), delta.update(torch.tensor([4.0]))
    (2.0, 3.0)
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.steps = 0
        self.mean = 0.0

    def update(self, rewards: Tensor) -> float:
        """Add a step's rewards, of any shape; waits for the device once."""
        check_parts("`RunningMean`", "is a mean over the batch", self.group)
        if self.group is None and not rewards.numel():
            raise TensorError("`rewards` must hold at least one")
        step = mean_over(rewards, check_group(self.group)).item()
        self.steps += 1
        self.mean += (step - self.mean) / self.steps
        return self.mean


def _column(value: Any) -> Any:
    return value[:, None] if isinstance(value, Tensor) else value
