"""A gradient that can be taken once, and how a node of the graph is called.

Where the backward of a backward would be wrong in silence, it is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dpo_ext.torch.numbers import derivatives, in_dual_level, transformed

KERNEL_LOGPS = (
    "the log-probs of the kernels can be differentiated once, not twice\n"
    'hint: impl="torch" has a second derivative per token (token_scores)'
)


def node(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, for a function that has a `setup_context`.

    torch.func and the compiler ask for forward and context apart. torch binds the arguments to the
    signature then, which takes 20 us a call, so elsewhere both run as one; and where nothing asks
    for a gradient there is no node, which takes 5 us and 3 more for each output.

    A `setup_context` may return the outputs that the caller reads, where the rest is for backward
    alone: only what runs as one then has no more than these.
    """
    recording = torch.is_grad_enabled()
    trains = recording and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if torch.compiler.is_compiling():
        # where nothing asks for a gradient Dynamo passes a context that forward does not take
        return function.apply(*arguments) if trains else function.forward(*arguments)
    if transformed():
        if any(isinstance(a, Tensor) and derivatives(a) > 1 for a in arguments):
            raise RuntimeError(getattr(function, "ONCE", KERNEL_LOGPS))
        return function.apply(*arguments)
    if trains or in_dual_level():
        return _joined(function).apply(*arguments)
    # an argument that is no tensor may hold one that asks for a gradient
    with torch.no_grad() if recording else nullcontext():
        return function.forward(*arguments)


@functools.cache
def _joined(function: Any) -> Any:
    """The same node with forward and context in one."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        read = function.setup_context(ctx, arguments, output)
        return output if read is None else read

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


def differentiable_once(value: Tensor, upstream: Tensor, message: str = KERNEL_LOGPS) -> Tensor:
    """A gradient whose own gradient, if ever asked for, is an error and not missing in silence."""
    if not torch.is_grad_enabled():  # autograd wants no graph of this backward pass
        return value
    if transformed():  # they ask by themselves
        return _DifferentiableOnce.apply(value, message, upstream)
    anchor = torch.zeros((), requires_grad=True)  # keeps the node where nothing else asks for one
    return _DifferentiableOnce.apply(value, message, upstream, anchor)


def one_by_one(gradients: Callable[[Tensor], tuple[Tensor | None, ...]], upstream: Tensor) -> Any:
    """``gradients(upstream)``; under vmap (`torch.func.jacrev`) of one upstream after the other,
    since what writes into buffers takes no batch of them.
    """
    if torch.compiler.is_compiling() or not transformed():
        return gradients(upstream)
    return _OneByOne.apply(gradients, upstream)


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(gradients: Any, upstream: Tensor) -> Any:
        return gradients(upstream)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], gradients: Any, upstream: Tensor) -> Any:
        each = [gradients(g) for g in upstream.movedim(in_dims[1], 0).unbind(0)]
        columns = [None if c[0] is None else torch.stack(c) for c in zip(*each, strict=True)]
        return tuple(columns), tuple(None if c is None else 0 for c in columns)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(KERNEL_LOGPS)


class _DifferentiableOnce(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, message: str, *parents: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)
