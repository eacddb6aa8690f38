"""The theory of preferences as functions: Bradley-Terry, Plackett-Luce, KL divergences, the optimal
policy.

NumPy alone, except for `reward_loss` and the divergences of tensors. Letters: K items, N pairs, V
choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StrengthFit:
    """Strengths of K items.

    Attributes:
        strengths: (K,) float64, above 0, with geometric mean 1: only ratios have a meaning.
        log_likelihood: of the data at these strengths, nats.
        iterations: Newton steps.
    """

    strengths: np.ndarray
    log_likelihood: float
    iterations: int

    @property
    def rewards(self) -> np.ndarray:
        """(K,) log-strengths, mean 0: the rewards of a Bradley-Terry model."""
        return np.log(self.strengths)


def bt_probability(strength_i: Any, strength_j: Any) -> Any:
    """P(i beats j) of Bradley-Terry: ``a_i / (a_i + a_j)``, the same as ``sigmoid(log a_i - log
    a_j)``.

    >>> bt_probability(2.0, 1.0)
    0.6666666666666666
    """
    return strength_i / (strength_i + strength_j)


def bt_fit(wins: Any, *, ties: Any = None, names: Sequence[str] | None = None) -> StrengthFit:
    """Maximum-likelihood strengths of Bradley-Terry from counted comparisons.

    Same as maximising ``sum_ij wins[i, j] * log(a_i / (a_i + a_j))``, here by Newton's method on
    ``log a``. Zermelo 1929; Bradley and Terry 1952. A tie counts as half a win for either.

    Args:
        wins: (K, K), ``wins[i, j]`` how often, or with which weight, i beat j; >= 0, 0 on the
            diagonal.
        ties: (K, K), how often i and j tied; the count of a pair may stand in one triangle or be
            halved over both.
        names: of the items, for errors.

    Raises:
        DataError: the counts are malformed, or do not decide the strengths: groups of items that
            were never compared, or a group that only ever won. ``reason`` is ``"disconnected"``
            then.

    >>> fit = bt_fit([[0, 1, 1, 1], [2, 0, 2, 2], [4, 4, 0, 4], [8, 8, 8, 0]])
    >>> np.round(fit.strengths / fit.strengths[0], 9).tolist()
    [1.0, 2.0, 4.0, 8.0]
    >>> bt_fit([[0, 3, 0], [2, 0, 0], [0, 0, 0]], names=["a", "b", "c"])
    Traceback (most recent call last):
        ...
    dpo_ext.errors.DataError: the comparisons do not connect the items: {a, b}, {c}
    hint: fit each group alone, or compare items of different groups
    """
    counts = _counts("wins", wins)
    if ties is not None:
        tied = _counts("ties", ties)
        if tied.shape != counts.shape:
            raise DataError(f"`ties` must be of shape {counts.shape}, found {tied.shape}")
        counts = counts + (tied + tied.T) / 2
    K = len(counts)
    _check_connected(counts > 0, names)
    i, j = np.nonzero(counts)
    weight = counts[i, j]

    def likelihood(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        d = theta[i] - theta[j]
        lose = np.exp(-np.logaddexp(0, d))  # P(j beats i)
        gradient = np.bincount(i, weight * lose, K) - np.bincount(j, weight * lose, K)
        curvature = weight * lose * (1 - lose)
        hessian = np.zeros((K, K))
        np.add.at(hessian, (i, i), curvature)
        np.add.at(hessian, (j, j), curvature)
        np.add.at(hessian, (i, j), -curvature)
        np.add.at(hessian, (j, i), -curvature)
        return float(-(weight * np.logaddexp(0, -d)).sum()), gradient, hessian

    return _newton(likelihood, K, float(weight.sum()))


def plackett_luce_fit(
    rankings: Sequence[Sequence[int]],
    *,
    items: int | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> StrengthFit:
    """Maximum-likelihood strengths of Plackett-Luce from rankings, whole or partial.

    Same as maximising, over rankings and places k, ``log(a_k / sum_{l >= k} a_l)``; lists of two
    are Bradley-Terry. Plackett 1975; Luce 1959.

    Args:
        rankings: lists of distinct items 0..K-1, best first, at least two each.
        items: K; None is the largest index + 1.
        weights: > 0, of each ranking.
        names: of the items, for errors.

    Raises:
        DataError: as `bt_fit`.

    >>> fit = plackett_luce_fit([[0, 1], [0, 1], [1, 0]])
    >>> float(np.round(fit.strengths[0] / fit.strengths[1], 9))
    2.0
    """
    if not rankings or any(len(r) < 2 or len(set(r)) != len(r) or min(r) < 0 for r in rankings):
        raise DataError("`rankings` must be lists of at least two distinct items, best first")
    K = max(max(r) for r in rankings) + 1 if items is None else items
    if max(max(r) for r in rankings) >= K:
        raise DataError(f"`rankings` must hold items below {K}")
    scale = np.ones(len(rankings)) if weights is None else np.asarray(weights, dtype=np.float64)
    if scale.shape != (len(rankings),) or not (scale > 0).all():
        raise DataError(f"`weights` must be {len(rankings)} numbers > 0")
    above = np.zeros((K, K), dtype=bool)
    for ranking in rankings:
        for place, better in enumerate(ranking):
            above[better, ranking[place + 1 :]] = True
    _check_connected(above, names)

    def likelihood(theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, gradient, hessian = 0.0, np.zeros(K), np.zeros((K, K))
        for ranking, w in zip(rankings, scale, strict=True):
            for place in range(len(ranking) - 1):
                rest = np.array(ranking[place:])
                top = theta[rest].max()
                share = np.exp(theta[rest] - top)
                value += w * (theta[rest[0]] - top - np.log(share.sum()))
                share /= share.sum()
                gradient[rest[0]] += w
                gradient[rest] -= w * share
                hessian[np.ix_(rest, rest)] += w * (np.diag(share) - np.outer(share, share))
        return float(value), gradient, hessian

    return _newton(likelihood, K, float(scale.sum()))


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Any = None,
    center: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Loss of a reward model on pairs.

    Same as ``mean(-log sigmoid(chosen - rejected - margin) + center*(chosen + rejected)^2)``.

    The Bradley-Terry likelihood (Ouyang et al. 2022, arXiv:2203.02155, eq. 1) with a margin for
    each pair (Touvron et al. 2023, arXiv:2307.09288, eq. 2) and centring, which fixes the free
    constant of the rewards (Eisenstein et al. 2023, arXiv:2312.09244).

    Args:
        chosen, rejected: (N,) rewards, float32 or float64.
        margin: a float or (N,): how far the chosen one must lead.
        center: >= 0.
        weight: (N,) >= 0; the mean is over N, not over the weights.

    >>> import torch
    >>> reward_loss(torch.tensor([1.0]), torch.tensor([0.0]))
    tensor(0.3133)
    """
    import torch
    from torch.nn.functional import logsigmoid

    from dpo_ext.errors import TensorError

    if chosen.dim() != 1 or chosen.shape != rejected.shape or chosen.dtype != rejected.dtype:
        raise TensorError(
            "`chosen` and `rejected` must be of one shape (N,) and dtype, found "
            f"{tuple(chosen.shape)} {chosen.dtype} and {tuple(rejected.shape)} {rejected.dtype}"
        )
    if not center >= 0:
        raise ValueError(f"`center` must be >= 0, found {center!r}")
    lead = chosen - rejected
    if margin is not None:
        lead = lead - torch.as_tensor(margin, dtype=lead.dtype, device=lead.device)
        if lead.shape != chosen.shape:
            raise TensorError(f"`margin` must be a number or of shape {tuple(chosen.shape)}")
    loss = -logsigmoid(lead)
    if center:
        loss = loss + center * (chosen + rejected) ** 2
    if weight is not None:
        if weight.shape != chosen.shape:
            raise TensorError(
                f"`weight` must be of shape {tuple(chosen.shape)}, found {tuple(weight.shape)}"
            )
        loss = torch.where(weight == 0, torch.zeros_like(loss), weight * loss)
    return loss.sum() / max(len(loss), 1)


def kl_divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """``KL(p || q) = sum_v p_v (log p_v - log q_v)`` of softmax rows, (...,) from (..., V);
    differentiable in both.

    Differentiable in both, and not symmetric: ``kl_divergence(policy, reference)`` is what RLHF
    penalises and punishes mass where the reference has none; the other way round it punishes
    missing mass. A column that p cannot take (-inf) contributes 0; one that q cannot take and p can
    makes it infinite.

    >>> import torch
    >>> p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    >>> kl_divergence(p, q), kl_divergence(q, p)
    (tensor(0.3681), tensor(0.5108))
    """
    import torch

    from dpo_ext.errors import TensorError

    if logits.shape != other_logits.shape or logits.dtype != other_logits.dtype:
        raise TensorError(
            f"both logits must have one shape and dtype, found {tuple(logits.shape)} "
            f"{logits.dtype} and {tuple(other_logits.shape)} {other_logits.dtype}"
        )
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(other_logits, -1)
    possible = log_p > -float("inf")
    gap = torch.where(possible, log_p, 0) - torch.where(possible, log_q, 0)
    return (torch.where(possible, log_p, -float("inf")).exp() * gap).sum(-1)


def kl_from_samples(logps: Any, other_logps: Any, *, estimator: str = "k3") -> Any:
    """Estimate of ``KL(p || q)`` from log-probs of samples *of p* under p and q: one term a sample,
    (N,).

    ``"k1"`` is ``log p - log q``, unbiased, of either sign; ``"k3"`` is ``q/p - 1 - log(q/p)``,
    unbiased, never negative, of lower variance where p and q are close (Schulman 2020). Average the
    terms.

    >>> terms = kl_from_samples(np.log([0.5, 0.5]), np.log([0.25, 0.75]), estimator="k1")
    >>> float(np.round(terms.mean(), 4))
    0.1438
    """
    ratio = other_logps - logps
    if estimator == "k1":
        return -ratio
    if estimator == "k3":
        expm1 = ratio.expm1() if hasattr(ratio, "expm1") else np.expm1(ratio)
        return expm1 - ratio
    raise ValueError(f"`estimator` must be 'k1' or 'k3', found {estimator!r}")


def implied_reward(logps: Any, ref_logps: Any, beta: Any, *, log_partition: Any = 0.0) -> Any:
    """The reward under which a policy is optimal: ``beta*(log pi - log pi_ref) + beta*log Z``.

    Without ``log_partition`` it is right up to a constant of the prompt, which cancels in every
    comparison. Rafailov et al. 2023, arXiv:2305.18290, eq. 5. Arrays or tensors.

    >>> implied_reward(-1.0, -3.0, 0.5)
    1.0
    """
    return beta * (logps - ref_logps) + beta * log_partition


def optimal_policy(ref_probs: Any, rewards: Any, beta: float) -> np.ndarray:
    """``pi* = pi_ref * exp(reward/beta) / Z``, which maximises ``E[reward] - beta*KL(pi, pi_ref)``.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 4.

    Args:
        ref_probs: (..., V), each row sums to 1.
        rewards: (..., V).
        beta: > 0.

    >>> optimal_policy([0.5, 0.25, 0.125, 0.125], np.log([1, 2, 4, 8]), 1.0).round(6).tolist()
    [0.2, 0.2, 0.2, 0.4]
    """
    scores = _tilted(ref_probs, rewards, beta)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def log_partition(ref_probs: Any, rewards: Any, beta: float) -> np.ndarray:
    """``log Z = log sum pi_ref * exp(reward/beta)``; ``beta*log Z`` is the highest ``E[reward] -
    beta*KL``.

    >>> float(log_partition([0.5, 0.5], [1.0, 1.0], 0.5))
    2.0
    """
    return np.logaddexp.reduce(_tilted(ref_probs, rewards, beta), -1)


def _tilted(ref_probs: Any, rewards: Any, beta: float) -> np.ndarray:
    ref, reward = np.asarray(ref_probs, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    if not beta > 0:
        raise ValueError(f"`beta` must be > 0, found {beta!r}")
    if ref.shape != reward.shape or ref.ndim < 1:
        raise ValueError(
            f"`ref_probs` and `rewards` must have one shape, found {ref.shape} and {reward.shape}"
        )
    if not ((ref >= 0).all() and np.allclose(ref.sum(-1), 1)):
        raise ValueError("`ref_probs` must be >= 0 and sum to 1")
    with np.errstate(divide="ignore"):
        return np.log(ref) + reward / beta


def _counts(name: str, values: Any) -> np.ndarray:
    counts = np.asarray(values, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 2:
        raise DataError(f"`{name}` must be of shape (K, K), found {counts.shape}")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and (np.diag(counts) == 0).all()):
        raise DataError(f"`{name}` must be finite and >= 0, with 0 on the diagonal")
    return counts


def _reach(edges: np.ndarray, start: int) -> np.ndarray:
    """Mask of the items that a walk along the edges reaches."""
    seen = np.zeros(len(edges), dtype=bool)
    frontier = np.zeros(len(edges), dtype=bool)
    frontier[start] = True
    while frontier.any():
        seen |= frontier
        frontier = edges[frontier].any(0) & ~seen
    return seen


def _check_connected(beats: np.ndarray, names: Sequence[str] | None) -> None:
    """Refuse data that do not decide the strengths, with the groups that show it."""

    def group(mask: np.ndarray) -> str:
        items = np.nonzero(mask)[0].tolist()
        return "{" + ", ".join(str(k) if names is None else names[k] for k in items) + "}"

    left = np.ones(len(beats), dtype=bool)
    groups = []
    while left.any():
        groups.append(_reach(beats | beats.T, int(np.argmax(left))))
        left &= ~groups[-1]
    if len(groups) > 1:
        raise DataError(
            f"the comparisons do not connect the items: {', '.join(map(group, groups))}\n"
            "hint: fit each group alone, or compare items of different groups",
            reason="disconnected",
        )
    for start in range(len(beats)):
        below = _reach(beats, start)
        if not below.all():
            raise DataError(
                f"no item of {group(below)} ever beat one of {group(~below)}: the ratio of their "
                "strengths has no maximum\nhint: drop a group, or add ties as a prior",
                reason="disconnected",
            )


def _newton(likelihood: Any, K: int, total: float) -> StrengthFit:
    """Maximise a concave likelihood of log-strengths that a constant leaves unchanged."""
    theta = np.zeros(K)
    value, gradient, hessian = likelihood(theta)
    steps = 0
    while steps < 200:
        if np.abs(gradient).max() <= 1e-13 * total:
            break
        steps += 1
        # the all-ones direction is free: give it curvature, the gradient has no share in it
        step = np.linalg.solve(hessian + np.full((K, K), total / K), gradient)
        length = 1.0
        while True:
            trial = theta + length * step
            new = likelihood(trial)
            if new[0] >= value - 1e-12 * abs(value) or length < 1e-8:
                break
            length /= 2
        done = np.abs(trial - theta).max() <= 1e-15 * (1 + np.abs(theta).max())
        theta, (value, gradient, hessian) = trial, new
        if done:
            break
    theta = theta - theta.mean()
    return StrengthFit(np.exp(theta), value, steps)
