"""A gradient that can be taken once.

Where the backward of a backward would be wrong in silence, it is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KERNEL_LOGPS = (
    "the log-probs of the kernels can be differentiated once, not twice\n"
    'hint: impl="torch" has a second derivative per token (token_scores)'
)


def differentiable_once(value: Tensor, upstream: Tensor, message: str = KERNEL_LOGPS) -> Tensor:
    """A gradient whose own gradient, if ever asked for, is an error and not missing in silence."""
    if not torch.is_grad_enabled():  # autograd wants no graph of this backward pass
        return value
    anchor = torch.zeros((), requires_grad=True)  # keeps the node where nothing else asks for one
    return _DifferentiableOnce.apply(value, message, upstream, anchor)


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, message: str, *parents: Tensor) -> Tensor:
        ctx.message = message
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)
