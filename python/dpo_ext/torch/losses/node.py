"""A row of the loss table as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.torch.losses.forms import Number, Symbols, over
from dpo_ext.torch.losses.inputs import Inputs
from dpo_ext.torch.losses.ranks import Gathered
from dpo_ext.torch.losses.row import LossRow
from dpo_ext.torch.once import differentiable_once

ONCE = (
    "a preference loss can be differentiated once, not twice\n"
    "hint: pass a function of the log-probs as `loss`; autograd differentiates it again"
)


class Bound(NamedTuple):
    """A row with a value for each of its parameters."""

    row: LossRow
    params: Mapping[str, Number]


class PairLoss(torch.autograd.Function):
    """A row of the table as one node of the graph: the forward pass keeps dL/dc and dL/dr of each
    pair. With ``whole`` the formula sees the pairs of all ranks and this rank keeps its own.

    ``logps`` are those of the inputs, because autograd sees arguments alone; ``differentiable`` the
    tensors among the parameters through which the gradient also flows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logps: Tensor,
        inputs: Inputs,
        bound: Bound,
        whole: Gathered | None,
        *differentiable: Tensor,
    ) -> tuple[Tensor, Tensor]:
        row, params = bound
        if whole is not None:
            seen = Symbols(whole.logps, whole.ref_logps, whole.lengths)
            per_pair, gc, gr, *others = row.formula(seen, **params)
            # clones: a slice of an output is a view of it
            per_pair, gc, gr = (t[whole.mine].clone() for t in (per_pair, gc, gr))
        else:
            seen = Symbols(logps, inputs.ref_logps, inputs.lengths)
            per_pair, gc, gr, *others = row.formula(seen, **params)
        grads = [gc, gr]
        if others:
            grads += [
                others[0][name] for name in row.differentiable if isinstance(params[name], Tensor)
            ]
        ctx.set_materialize_grads(False)
        ctx.count = inputs.count
        ctx.save_for_backward(inputs.weight, *grads)
        if row.couples_batch:
            ctx.mark_non_differentiable(per_pair)
        return over(weighted_sum(per_pair, inputs.weight), inputs.count), per_pair

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_per_pair: Tensor | None) -> Any:
        upstream = grad_per_pair if grad_loss is None else grad_loss
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad():
            grad, others = PairLoss._gradients(ctx, grad_loss, grad_per_pair)
        if torch.is_grad_enabled():  # create_graph=True
            grad, *others = (differentiable_once(g, upstream, ONCE) for g in (grad, *others))
        return grad, None, None, None, *others

    @staticmethod
    def _gradients(ctx: Any, grad_loss: Any, grad_per_pair: Any) -> tuple[Tensor, list[Tensor]]:
        weight, gc, gr, *others = ctx.saved_tensors
        if grad_loss is None:
            factor = grad_per_pair
        else:
            factor = over(grad_loss, ctx.count)
            if weight is not None:
                factor = factor * weight
            if grad_per_pair is not None:
                factor = factor + grad_per_pair
        if weight is not None:
            zero = torch.zeros_like(gc)
            gc, gr, *others = (torch.where(factor == 0, zero, g) for g in (gc, gr, *others))
        if factor.dim() == 0:
            grad = torch.stack((gc, gr), 1).mul_(factor)
        else:
            grad = torch.stack((gc * factor, gr * factor), 1)
        return grad, [g * factor for g in others]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logps: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        shape = (-1,) + (1,) * (slope.dim() - 1)
        with torch.no_grad():
            grad = upstream.reshape(shape) * slope
        return differentiable_once(grad, upstream, ONCE), None, None


def attach(logps: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A value (N,) computed without a graph, with the gradient ``slope`` by the log-probs that was
    computed beside it.
    """
    return _Attach.apply(logps, value, slope)


def weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """``sum(weight * values)``; a value of weight 0 is not read."""
    if weight is None:
        return values.sum()
    # a select, not a product: 0 * NaN is NaN
    return torch.where(weight == 0, torch.zeros_like(values), weight * values).sum()
