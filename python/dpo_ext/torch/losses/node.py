"""A row of the loss table as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.torch.losses.forms import Number, Symbols, over
from dpo_ext.torch.losses.ranks import Gathered
from dpo_ext.torch.losses.row import LossRow
from dpo_ext.torch.numbers import transformed
from dpo_ext.torch.once import differentiable_once, node

ONCE = (
    "a preference loss can be differentiated once, not twice\n"
    "hint: pass a function of the log-probs as `loss`; autograd differentiates it again"
)


class Bound(NamedTuple):
    """A row with a value for each of its parameters."""

    row: LossRow
    params: Mapping[str, Number]


class Pairs(NamedTuple):
    """What a row is computed of beside the log-probs: this rank's pairs, or those of all ranks."""

    ref_logps: Tensor | None
    lengths: Tensor | None
    weight: Tensor | None
    divisor: float | Tensor
    whole: Gathered | None

    def evaluate(self, logps: Tensor, bound: Bound) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss of each pair, and what it is differentiated by: ``dL/dc, dL/dr`` side by side (N, 2)
        and those of the parameters that ask for it. No graph.
        """
        made = self._in_one_pass(logps, bound)
        if made is not None:
            return made[1], made[2:]
        row, params = bound
        if self.whole is not None:
            whole = self.whole
            seen = Symbols(whole.logps, whole.ref_logps, whole.lengths)
            per_pair, gc, gr, *others = row.formula(seen, **params)
            # a clone: a slice of an output is a view of it
            per_pair, gc, gr = per_pair[whole.mine].clone(), gc[whole.mine], gr[whole.mine]
        else:
            seen = Symbols(logps, self.ref_logps, self.lengths)
            per_pair, gc, gr, *others = row.formula(seen, **params)
        slopes = torch.stack((gc, gr), 1)
        if not others:
            return per_pair, (slopes,)
        asked = [n for n in row.differentiable if isinstance(params[n], Tensor)]
        return per_pair, (slopes, *(others[0][name] for name in asked))

    def mean(self, logps: Tensor, bound: Bound) -> tuple[Tensor, ...]:
        """The batch loss before what `evaluate` gives."""
        made = None if self.weight is not None else self._in_one_pass(logps, bound)
        if made is not None:
            total, *others = made
        else:
            per_pair, slopes = self.evaluate(logps, bound)
            total, others = weighted_sum(per_pair, self.weight), [per_pair, *slopes]
        return over(total, self.divisor), *others

    def _in_one_pass(self, logps: Tensor, bound: Bound) -> tuple[Tensor, ...] | None:
        """Sum, loss of each pair and slopes by one call, where a row has one and can be given it:
        tensors of the CPU and numbers.
        """
        row, params = bound
        if row.on_cpu is None or torch.compiler.is_compiling() or transformed():
            return None
        tensors = (logps, self.ref_logps)
        if any(type(t) is not Tensor or t.device.type != "cpu" for t in tensors):
            return None
        if any(isinstance(value, Tensor) for value in params.values()):
            return None
        return row.on_cpu(*tensors, **params)


class PairLoss(torch.autograd.Function):
    """A row of the table as one node of the graph: the forward pass keeps dL/dc and dL/dr of each
    pair. With ``whole`` the formula sees the pairs of all ranks and this rank keeps its own.

    ``differentiable`` are the tensors among the parameters through which the gradient also flows.
    """

    ONCE = ONCE

    @staticmethod
    def forward(
        logps: Tensor, pairs: Pairs, bound: Bound, *differentiable: Tensor
    ) -> tuple[Tensor, ...]:
        if differentiable:  # as torch.func sees them: without its wrappers
            tensors = iter(differentiable)
            params = {
                name: next(tensors)
                if name in bound.row.differentiable and isinstance(value, Tensor)
                else value
                for name, value in bound.params.items()
            }
            bound = Bound(bound.row, params)
        return pairs.mean(logps, bound)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        _, pairs, bound, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.divisor = pairs.divisor
        ctx.save_for_backward(pairs.weight, *output[2:])
        ctx.mark_non_differentiable(*output[1 if bound.row.couples_batch else 2 :])
        return output[:2]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_per_pair: Tensor | None, *_: Any) -> Any:
        upstream = grad_per_pair if grad_loss is None else grad_loss
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad():
            grad, others = PairLoss._gradients(ctx, grad_loss, grad_per_pair)
        if torch.is_grad_enabled():  # create_graph=True
            grad, *others = (differentiable_once(g, upstream, ONCE) for g in (grad, *others))
        return grad, None, None, *others

    @staticmethod
    def _gradients(ctx: Any, grad_loss: Any, grad_per_pair: Any) -> tuple[Tensor, list[Tensor]]:
        weight, slopes, *others = ctx.saved_tensors
        if grad_loss is None:
            factor = grad_per_pair
        else:
            factor = over(grad_loss, ctx.divisor)
            if weight is not None:
                factor = factor * weight
            if grad_per_pair is not None:
                factor = factor + grad_per_pair
        column = factor[:, None] if factor.dim() else factor
        if weight is not None:
            slopes = torch.where(column == 0, torch.zeros_like(slopes), slopes)
            others = [torch.where(factor == 0, torch.zeros_like(g), g) for g in others]
        return slopes * column, [g * factor for g in others]


def slopes_of(logps: Tensor, pairs: Pairs, bound: Bound) -> Tensor:
    """(N, 2) gradient of the batch loss by the log-probs, without a graph."""
    _, (slopes, *_) = pairs.evaluate(logps, bound)
    if pairs.weight is not None:
        weight = pairs.weight[:, None]
        slopes = torch.where(weight == 0, torch.zeros_like(slopes), slopes * weight)
    return over(slopes, pairs.divisor)


class _Attach(torch.autograd.Function):
    ONCE = ONCE

    @staticmethod
    def forward(logps: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        with torch.no_grad():
            factor = upstream.reshape(*upstream.shape, *(1,) * (slope.dim() - 1))
            # an example of weight 0 is not read: 0 * NaN is NaN
            grad = torch.where(factor == 0, torch.zeros_like(slope), factor * slope)
        return differentiable_once(grad, upstream, ONCE), None, None


def attach(logps: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """A value (N,) computed without a graph, with the gradient ``slope`` by the log-probs that was
    computed beside it. Where the upstream gradient is 0 the slope is not read.
    """
    return node(_Attach, logps, value, slope)


def weighted_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """``sum(weight * values)``; a value of weight 0 is not read."""
    if weight is None:
        return values.sum()
    # a select, not a product: 0 * NaN is NaN
    return torch.where(weight == 0, torch.zeros_like(values), weight * values).sum()
