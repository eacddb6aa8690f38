"""What takes tensors: the loss of a reward model, and the KL divergence of softmax rows.

torch is imported inside the functions. Letters: N pairs, V choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpo_ext.errors import TensorError, describe
from dpo_ext.extras import need
from dpo_ext.preference.strengths import check_number

if TYPE_CHECKING:
    from torch import Tensor


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

    from dpo_ext.torch.numbers import as_number, host_values

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
    center = as_number("center", center)
    check_number("center", center, lambda x: (x >= 0) & (x - x == 0), ">= 0 and finite")
    given = {"chosen": chosen, "rejected": rejected}
    if margin is not None:
        given["margin"] = _of_pairs("margin", margin, chosen)
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
    if weight is not None:  # selected before anything is computed: 0 * NaN is NaN, backward too
        given = {
            name: torch.where(weight == 0, torch.zeros_like(value), value)
            for name, value in given.items()
        }
        chosen, rejected = given["chosen"], given["rejected"]
    lead = chosen - rejected
    if margin is not None:
        lead = lead - given["margin"]
    loss = -logsigmoid(lead)
    if center:
        loss = loss + center * (chosen + rejected) ** 2
    if weight is not None:
        loss = torch.where(weight == 0, torch.zeros_like(loss), weight * loss)
    return loss.sum() / max(len(loss), 1)


def _of_pairs(name: str, value: Any, like: Tensor) -> Tensor:
    """(N,) in the dtype and on the device of the rewards."""
    import torch

    from dpo_ext.torch.numbers import as_number

    value = as_number(name, value)
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
