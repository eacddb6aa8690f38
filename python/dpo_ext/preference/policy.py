"""The theory of preferences as functions: Bradley-Terry, Plackett-Luce, KL divergences, the optimal
policy.

NumPy alone, except for `reward_loss` and the divergences of tensors. Letters: N pairs, V choices.
The fits are in `strengths`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_ext.extras import need
from dpo_ext.preference.strengths import (
    StrengthFit,
    as_array,
    bt_fit,
    bt_probability,
    check_number,
    plackett_luce_fit,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "StrengthFit",
    "bt_fit",
    "bt_probability",
    "implied_reward",
    "kl_divergence",
    "kl_from_samples",
    "log_partition",
    "optimal_policy",
    "plackett_luce_fit",
    "reward_loss",
]


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
        margin: finite, a float or (N,): how far the chosen one must lead.
        center: >= 0.
        weight: (N,) >= 0; the mean is over N, not over the weights. A pair of weight 0 is not read.

    Returns:
        Tensor: scalar, differentiable in the rewards.

    Raises:
        TensorError: wrong shapes or dtypes; on the CPU a NaN, or a weight below 0.
        ValueError: ``center`` is out of range.

    >>> import torch
    >>> reward_loss(torch.tensor([1.0]), torch.tensor([0.0]))
    tensor(0.3133)
    """
    need("torch", "reward_loss")
    import torch
    from torch.nn.functional import logsigmoid

    from dpo_ext.errors import TensorError, describe
    from dpo_ext.torch.losses.checks import host_values

    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch tensor, found {type(value).__name__}")
    if chosen.dtype not in (torch.float32, torch.float64):
        hint = "\nhint: use `.float()`" if chosen.is_floating_point() else ""
        raise TensorError(
            f"`chosen` must be float32 or float64 of shape (N,), found {describe(chosen)}{hint}"
        )
    if chosen.dim() != 1 or chosen.shape != rejected.shape or chosen.dtype != rejected.dtype:
        raise TensorError(
            "`chosen` and `rejected` must be of one shape (N,) and dtype, found "
            f"{describe(chosen)} and {describe(rejected)}"
        )
    check_number("center", center, lambda x: (x >= 0) & (x - x == 0), ">= 0 and finite")
    lead, given = chosen - rejected, {"chosen": chosen, "rejected": rejected}
    if margin is not None:
        given["margin"] = _of_pairs("margin", margin, chosen)
        lead = lead - given["margin"]
    if weight is not None:
        weight = given["weight"] = _of_pairs("weight", weight, chosen)
    for name, value in given.items():
        if host_values(value):
            bad = value.isnan() if name != "weight" else ~(value >= 0)
            bad = bad if name == "weight" or weight is None else bad & (weight != 0)
            if bad.any():
                pair = int(bad.nonzero()[0])
                what = "must be >= 0" if name == "weight" else "must not be NaN"
                raise TensorError(f"pair {pair}: `{name}` {what}, found {value[pair].item():g}")
    loss = -logsigmoid(lead)
    if center:
        loss = loss + center * (chosen + rejected) ** 2
    if weight is not None:
        loss = torch.where(weight == 0, torch.zeros_like(loss), weight * loss)
    return loss.sum() / max(len(loss), 1)


def _of_pairs(name: str, value: Any, like: Tensor) -> Tensor:
    """(N,) in the dtype and on the device of the rewards."""
    import torch

    from dpo_ext.errors import TensorError

    try:
        values = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`{name}` must be one number or {len(like)}, found {type(value).__name__}"
        ) from error
    if values.dim() and values.shape != like.shape:
        raise TensorError(
            f"`{name}` must be a number or of shape {tuple(like.shape)}, found "
            f"{tuple(values.shape)}"
        )
    return values.expand(like.shape)


def kl_divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """``KL(p || q) = sum_v p_v (log p_v - log q_v)`` of softmax rows, (...,) from (..., V).

    Differentiable in both, and not symmetric: ``kl_divergence(policy, reference)`` is what RLHF
    penalises and punishes mass where the reference has none; the other way round it punishes
    missing mass. A column that p cannot take (-inf) contributes 0; one that q cannot take and p can
    makes it infinite. NaN stays NaN. Half precision is computed and returned in float32.

    Raises:
        TensorError: the logits differ in shape, dtype or device, or are not rows of numbers.

    >>> import torch
    >>> p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    >>> kl_divergence(p, q), kl_divergence(q, p)
    (tensor(0.3681), tensor(0.5108))
    """
    need("torch", "kl_divergence")
    import torch

    from dpo_ext.errors import TensorError

    for name, value in (("logits", logits), ("other_logits", other_logits)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch tensor, found {type(value).__name__}")
        if not value.is_floating_point() or value.dim() < 1 or not value.shape[-1]:
            raise TensorError(
                f"`{name}` must be floating-point of shape (..., V), found {tuple(value.shape)} "
                f"{value.dtype}"
            )
    if logits.shape != other_logits.shape or logits.dtype != other_logits.dtype:
        raise TensorError(
            f"both logits must have one shape and dtype, found {tuple(logits.shape)} "
            f"{logits.dtype} and {tuple(other_logits.shape)} {other_logits.dtype}"
        )
    if logits.device != other_logits.device:
        raise TensorError(
            f"`other_logits` must be on {logits.device}, found it on {other_logits.device}"
        )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits, other_logits = logits.float(), other_logits.float()
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(other_logits, -1)
    never = log_p == -float("inf")
    gap = torch.where(never, 0, log_p) - torch.where(never, 0, log_q)
    return (torch.where(never, -float("inf"), log_p).exp() * gap).sum(-1)


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
