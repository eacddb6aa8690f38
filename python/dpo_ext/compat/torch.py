"""torch's own head with its loss inside (``torch.nn.functional``, torch 2.13 and later)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dpo_ext.compat.parts.heads import token_grid
from dpo_ext.compat.parts.rows import like
from dpo_ext.torch.logps.products import wide
from dpo_ext.torch.logps.scores import is_dtensor

__all__ = ["linear_cross_entropy"]
IGNORED = -100


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Cross entropy of the rows of a linear head, without their logits.

    Same as torch's::

        logits = F.linear(input, linear_weight, linear_bias)
        F.cross_entropy(logits, target, weight, ignore_index=-100 if ignore_index is None else
                        ignore_index, reduction=reduction, label_smoothing=label_smoothing)

    with any reduction, class weights and smoothing: with ``y`` the logits of a row, t its target,
    ``-sum_v w_v log p_v = lse * sum_v w_v - sum_v w_v y_v``, whose last term needs one sum over the
    weight's rows. Targets that are probabilities, and the K-dimensional loss, are computed as in
    the two lines above.

    Args:
        input: (R, H) or (H,), float32, bfloat16, float16 or float64.
        linear_weight, linear_bias: (V, H), (V,) or None. K-dimensional: (V, d_1, ..., H).
        target: (R,) or () int64 classes, or probabilities in the shape of the logits.
        weight: (V,) factor of each class, without gradient.
        reduction: ``"none"``, ``"mean"`` (over the sum of the factors) or ``"sum"``.
        ignore_index: the target that is not scored; -100 by default.
        label_smoothing: in [0, 1].
        options: torch's ``LinearCrossEntropyOptions``; its ``batch_chunk_size`` is the rows of a
            chunk here, by default as many as keep their logits within 1.1 GB.

    Returns:
        A scalar, or the shape of ``target``; the dtype of ``input``, float32 under autocast. The
        mean over no target is NaN, as theirs.

    Raises:
        TensorError: shapes or dtypes differ; on the CPU a class outside [0, V).  RuntimeError,
            ValueError: torch's, for what it refuses too.

    Numerics: logits are rounded to the dtype of the product, all else is float32 (theirs without
    ``options`` rounds the log-softmax as well). A second derivative is refused.

    >>> linear_cross_entropy(torch.zeros(2, 8), torch.zeros(4, 8), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    classes = target.shape == input.shape[:-1] and target.dtype == torch.int64
    known = reduction in ("none", "mean", "sum") and 0.0 <= label_smoothing <= 1.0
    served = not (is_dtensor(input) or is_dtensor(linear_weight) or input.is_meta)
    matrix = linear_weight.dim() == 2 and input.dim() in (1, 2)
    if not (classes and known and served and matrix):
        return _reference(
            input,
            linear_weight,
            target,
            linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
    x, t = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    scored = t != (IGNORED if ignore_index is None else ignore_index)
    rows = getattr(options, "batch_chunk_size", None)
    grid = token_grid(
        x[None],
        linear_weight,
        linear_bias,
        t[None],
        scored[None],
        chunk_rows=rows,
        compact=x.device.type == "cpu" and not torch.compiler.is_compiling(),
    )
    loss = -grid[0]
    factors = scored.to(loss.dtype)
    if weight is not None:
        factors = factors * weight.detach().to(loss.dtype)[t.clamp(0, len(weight) - 1)]
    if label_smoothing:
        V = linear_weight.shape[0]
        smooth = _uniform(x, linear_weight, linear_bias, t, loss, weight)
        smooth = torch.where(scored, smooth, 0.0) * (label_smoothing / V)
        loss = torch.where(scored, loss * factors, 0.0) * (1.0 - label_smoothing) + smooth
    elif weight is not None:
        loss = torch.where(scored, loss * factors, 0.0)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.float32 if autocast else input.dtype
    if reduction == "none":
        return like(loss.reshape(target.shape), dtype)
    total = loss.sum()
    return like(total / factors.sum() if reduction == "mean" else total, dtype)


def _uniform(
    x: Tensor, w: Tensor, b: Tensor | None, t: Tensor, loss: Tensor, factors: Tensor | None
) -> Tensor:
    """(R,) ``-sum_v w_v log p_v`` from the loss ``lse - y_t`` of each row."""
    sums = wide(x.dtype)
    x, own = x.to(sums), t.clamp(0, max(w.shape[0] - 1, 0))
    y = (x * w[own].to(sums)).sum(1)
    v = torch.ones(w.shape[0], dtype=sums, device=w.device)
    v = v if factors is None else factors.detach().to(sums)
    every = x @ (v @ w.to(sums))
    if b is not None:
        y, every = y + b[own].to(sums), every + v @ b.to(sums)
    return (loss.to(sums) + y) * v.sum() - every


def _reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    *,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
) -> Tensor:
    """The two lines of torch's definition, whose logits probabilities and K dimensions need."""
    V, *out, H = linear_weight.shape
    flat = None if linear_bias is None else linear_bias.reshape(-1)
    logits = nn.functional.linear(input, linear_weight.reshape(-1, H), flat)
    logits = logits.reshape(*input.shape[:-1], V, *out)
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError("`ignore_index` cannot be given with targets that are probabilities")
    return nn.functional.cross_entropy(
        logits,
        target,
        weight=weight,
        reduction=reduction,
        ignore_index=IGNORED if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )
