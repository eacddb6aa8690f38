"""A row of the loss table as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError
from dpo_ext.torch.losses.checks import check_num_pairs, check_weight, host_values
from dpo_ext.torch.losses.forms import Pairs, over
from dpo_ext.torch.losses.result import GroupLoss
from dpo_ext.torch.once import _anchor, _Once


class PairLoss(torch.autograd.Function):
    """A row of the table as one node of the graph: the forward pass keeps dL/dc and dL/dr of each
    pair. With ``gathered`` the formula sees the pairs of all ranks and this rank keeps its own.
    """

    @staticmethod
    def forward(
        ctx, logps, ref_logps, lengths, row, params, weight, count, gathered, *differentiable
    ):
        if gathered is None:
            seen = Pairs(logps, ref_logps, lengths)
        else:
            seen = Pairs(gathered.logps, gathered.ref_logps, gathered.lengths)
        per_pair, gc, gr, *others = row.formula(seen, **params)
        if gathered is not None:  # clones: a slice of an output is a view of it
            per_pair, gc, gr = (t[gathered.mine].clone() for t in (per_pair, gc, gr))
        grads = [gc, gr]
        if others:
            grads += [
                others[0][name] for name in row.differentiable if isinstance(params[name], Tensor)
            ]
        ctx.set_materialize_grads(False)
        ctx.count = count
        ctx.save_for_backward(weight, *grads)
        if row.couples_batch:
            ctx.mark_non_differentiable(per_pair)
        if weight is None:
            return over(per_pair.sum(), count), per_pair
        # a select, not a product: 0 * NaN is NaN
        kept = torch.where(weight == 0, torch.zeros_like(per_pair), weight * per_pair)
        return over(kept.sum(), count), per_pair

    @staticmethod
    def backward(ctx, grad_loss, grad_per_pair):
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                grads = PairLoss._gradients(ctx, grad_loss, grad_per_pair)
            return tuple(None if g is None else _Once.apply(g, _anchor()) for g in grads)
        return PairLoss._gradients(ctx, grad_loss, grad_per_pair)

    @staticmethod
    def _gradients(ctx, grad_loss, grad_per_pair):
        weight, gc, gr, *others = ctx.saved_tensors
        if grad_loss is not None:
            factor = over(grad_loss, ctx.count)
            if weight is not None:
                factor = factor * weight
            if grad_per_pair is not None:
                factor = factor + grad_per_pair
        elif grad_per_pair is not None:
            factor = grad_per_pair
        else:
            return (None,) * (8 + len(others))
        if weight is not None:
            zero = torch.zeros_like(gc)
            gc, gr, *others = (torch.where(factor == 0, zero, g) for g in (gc, gr, *others))
        if factor.dim() == 0:
            grad = torch.stack((gc, gr), 1).mul_(factor)
        else:
            grad = torch.stack((gc * factor, gr * factor), 1)
        return grad, *(None,) * 7, *(g * factor for g in others)


class _Attach(torch.autograd.Function):
    """Gives a value computed without a graph the gradient that was computed beside it."""

    @staticmethod
    def forward(ctx, logps, value, slope):
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("a preference loss can be differentiated once, not twice")
        (slope,) = ctx.saved_tensors
        shape = (-1,) + (1,) * (slope.dim() - 1)
        return upstream.reshape(shape) * slope, None, None


def _finish(
    logps: Tensor,
    value: Tensor,
    slope: Tensor,
    rewards: Tensor,
    weight: Any,
    count: float | Tensor | None,
) -> GroupLoss:
    per_example = _Attach.apply(logps, value, slope)
    kept = per_example
    if weight is not None:
        factor = check_weight(weight, logps)
        kept = torch.where(factor == 0, torch.zeros_like(kept), factor * kept)
    divisor = max(len(logps), 1) if count is None else check_num_pairs(count)
    total = kept.sum() / divisor
    if host_values(total) and bool(total.isnan()):
        example = int(value.isnan().nonzero()[0])
        raise TensorError(f"example {example}: the loss is NaN for logps {logps[example].tolist()}")
    return GroupLoss(total, per_example, rewards)
