"""Strengths from comparisons and rankings: the maximum-likelihood fits behind `dpo_ext.preference`.

NumPy alone. K items.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_ext.errors import DataError


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

    Args:
        strength_i, strength_j: > 0; numbers, arrays or tensors.

    Raises:
        ValueError: a strength is not a number above 0.

    >>> bt_probability(2.0, 1.0)
    0.6666666666666666
    """
    for name, value in (("strength_i", strength_i), ("strength_j", strength_j)):
        check_number(name, value, lambda x: (x > 0) & (x - x == 0), "> 0 and finite")
    return strength_i / (strength_i + strength_j)


def bt_fit(wins: Any, *, ties: Any = None, names: Sequence[str] | None = None) -> StrengthFit:
    """Maximum-likelihood strengths of Bradley-Terry from counted comparisons.

    Same as maximising ``sum_ij wins[i, j] * log(a_i / (a_i + a_j))``, here by Newton's method on
    ``log a``. Zermelo 1929; Bradley and Terry 1952. A tie counts as half a win for either.

    Args:
        wins: (K, K), ``wins[i, j]`` how often, or with which weight, i beat j; >= 0, 0 on the
            diagonal. A symmetric matrix says that all are equally strong; one with several counts
            looks like how often two items met, and is warned of.
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
    _check_names(names, K)
    _check_connected(counts > 0, names)
    if K > 2 and ties is None and (counts == counts.T).all():
        warnings.warn(
            "`wins` is symmetric: each item beat each other as often as it lost, so that all "
            "strengths are equal\nhint: wins[i, j] counts how often i beat j, not how often they "
            "met; draws go into `ties`",
            stacklevel=2,
        )
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
    try:
        rankings = [[operator.index(item) for item in ranking] for ranking in rankings]
    except TypeError as error:
        raise DataError("`rankings` must be lists of items 0..K-1, integers") from error
    if not rankings or any(len(r) < 2 or len(set(r)) != len(r) or min(r) < 0 for r in rankings):
        raise DataError("`rankings` must be lists of at least two distinct items, best first")
    K = max(max(r) for r in rankings) + 1 if items is None else items
    if max(max(r) for r in rankings) >= K:
        raise DataError(f"`rankings` must hold items below {K}")
    scale = np.ones(len(rankings))
    if weights is not None:
        scale = as_array("weights", weights)
    if scale.shape != (len(rankings),) or not ((scale > 0) & np.isfinite(scale)).all():
        raise DataError(f"`weights` must be {len(rankings)} numbers > 0 and finite")
    _check_names(names, K)
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


def as_array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"`{name}` must be an array of numbers") from error


def check_number(name: str, value: Any, contains: Any, domain: str) -> None:
    """Of a number, an array or a tensor, but no bool: all inside."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        raise TypeError(f"`{name}` must be a number, found bool")
    try:
        inside = contains(value)
        inside = bool(inside.all()) if hasattr(inside, "all") else bool(inside)
    except TypeError as error:
        raise TypeError(f"`{name}` must be a number, found {type(value).__name__}") from error
    if not inside:
        raise ValueError(f"`{name}` must be {domain}, found {value!r}")


def _check_names(names: Sequence[str] | None, K: int) -> None:
    if names is not None and len(names) != K:
        raise DataError(f"`names` must have {K} entries, one an item, found {len(names)}")


def _counts(name: str, values: Any) -> np.ndarray:
    counts = as_array(name, values)
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
        if not gradient.any():
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
        done = np.abs(trial - theta).max() <= 1e-10  # Newton squares the error: 1e-20 is left
        theta, (value, gradient, hessian) = trial, new
        if done:
            break
    theta = theta - theta.mean()
    return StrengthFit(np.exp(theta), value, steps)
