"""The optimal policy, its partition function, the reward that a policy implies, KL from samples.

NumPy alone. Letters: N pairs, V choices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dpo_ext.preference.strengths import as_array, check_number


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
    if estimator not in ("k1", "k3"):
        raise ValueError(f"`estimator` must be 'k1' or 'k3', found {estimator!r}")
    logps, other_logps = (x if hasattr(x, "shape") else np.asarray(x) for x in (logps, other_logps))
    if tuple(logps.shape) != tuple(other_logps.shape):
        raise ValueError(
            f"`other_logps` must have the shape of `logps`, {tuple(logps.shape)}, found "
            f"{tuple(other_logps.shape)}"
        )
    ratio = other_logps - logps
    if estimator == "k1":
        return -ratio
    if hasattr(ratio, "expm1"):
        return ratio.expm1() - ratio
    with np.errstate(over="ignore"):  # q/p is beyond float64
        return np.expm1(ratio) - ratio


def implied_reward(logps: Any, ref_logps: Any, beta: Any, *, log_partition: Any = 0.0) -> Any:
    """The reward under which a policy is optimal: ``beta*(log pi - log pi_ref) + beta*log Z``.

    Without ``log_partition`` it is right up to a constant of the prompt, which cancels in every
    comparison. Rafailov et al. 2023, arXiv:2305.18290, eq. 5. Arrays or tensors.

    Raises:
        ValueError: ``beta`` is not above 0.

    >>> implied_reward(-1.0, -3.0, 0.5)
    1.0
    """
    check_number("beta", beta, lambda x: (x > 0) & (x - x == 0), "> 0 and finite")
    if isinstance(logps, list | tuple):
        logps = np.asarray(logps)
    return beta * (logps - ref_logps) + beta * log_partition


def optimal_policy(ref_probs: Any, rewards: Any, beta: float) -> np.ndarray:
    """``pi* = pi_ref * exp(reward/beta) / Z``, which maximises ``E[reward] - beta*KL(pi, pi_ref)``.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 4.

    Args:
        ref_probs: (..., V), each row sums to 1.
        rewards: (..., V), finite; -inf for what must not be said.
        beta: > 0.

    Raises:
        ValueError: one of them is malformed; names it.

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
    ref, reward = as_array("ref_probs", ref_probs), as_array("rewards", rewards)
    check_number("beta", beta, lambda x: x > 0, "> 0")
    if ref.shape != reward.shape or ref.ndim < 1:
        raise ValueError(
            f"`ref_probs` and `rewards` must have one shape, found {ref.shape} and {reward.shape}"
        )
    if not ((ref >= 0).all() and np.allclose(ref.sum(-1), 1)):
        raise ValueError("`ref_probs` must be >= 0 and sum to 1")
    if not (reward < np.inf).all():
        raise ValueError("`rewards` must be finite (or -inf), found NaN or inf")
    if not ((ref > 0) & (reward > -np.inf)).any(-1).all():
        raise ValueError("`rewards` must leave something that `ref_probs` can say")
    with np.errstate(divide="ignore"):
        return np.log(ref) + reward / beta
