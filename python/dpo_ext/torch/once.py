"""A gradient that can be taken once: where the backward of a backward would be wrong in silence, it is an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def differentiable_once(value: Tensor, upstream: Tensor) -> Tensor:
    """A gradient whose own gradient, if ever asked for, is an error instead of silently missing."""
    if not torch.is_grad_enabled():  # autograd wants no graph of this backward pass
        return value
    anchor = torch.zeros((), requires_grad=True)
    return _DifferentiableOnce.apply(value, upstream, anchor)


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *parents: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "the log-probs of the kernels can be differentiated once, not twice\n"
            'hint: impl="torch" has a second derivative per token (token_scores)'
        )


def _anchor() -> Tensor:
    """Something that asks for a gradient, so that the node behind a gradient is kept."""
    return torch.zeros((), requires_grad=True)


class _Once(torch.autograd.Function):
    """A gradient whose own derivative is an error instead of silently missing."""

    @staticmethod
    def forward(ctx, value, anchor):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "a preference loss can be differentiated once, not twice\n"
            "hint: pass a function of the log-probs as `loss`; autograd differentiates it again"
        )
