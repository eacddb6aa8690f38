"""Entropy of rows of logits with a gradient: ours carry none, TRL's do.

Letters: R rows of a chunk, V vocabulary, H hidden.

With ``y`` the logits after scale, cap and temperature, ``p = softmax(y)``, ``E = -sum p log p``:
``dE/dy_j = -p_j (log p_j + E)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.torch.logps import twin
from dpo_ext.torch.logps.scores import Transform
from dpo_ext.torch.once import differentiable_once, node

CHUNK_BYTES = 4_000_000
"""Bound of one chunk of given logits in float32 in the backward pass: it stays in the cache."""
HEAD_BYTES = 64_000_000
"""The same where a chunk is multiplied, and adds to a gradient of the size of the weight."""
_PLAIN = Transform(1.0, 0.0, 1.0)


def attach_entropy(rows: Tensor, places: Tensor, value: Tensor, how: Transform) -> Tensor:
    """``value`` (M,), the entropy of ``rows[places]``, with its gradient by the rows (R, V)."""
    return node(_Entropy, rows, places, value.detach(), how)


def attach_linear_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, how: Transform
) -> Tensor:
    """``value`` (M,), the entropy of ``hidden @ weight.T + bias``, with its gradients."""
    return node(_LinearEntropy, hidden, weight, bias, value.detach(), how)


def _chunks(count: int, V: int, budget: int) -> list[slice]:
    step = max(budget // (4 * max(V, 1)), 1)
    return [slice(start, start + step) for start in range(0, count, step)]


def _slope(z: Tensor, value: Tensor, g: Tensor, how: Transform) -> Tensor:
    """(R, V) gradient of ``sum(g * entropy)`` by raw logits; a row of ``g`` 0 is not read."""
    y = twin.transform(z, *how) if how != _PLAIN else z
    dz = torch.log_softmax(y, -1, dtype=_wide(z.dtype))
    p = dz.exp()
    # a logit of -inf has p = 0, and 0 * -inf is NaN
    dz.clamp_(min=torch.finfo(dz.dtype).min).add_(value[:, None].to(dz.dtype)).mul_(p)
    dz.mul_((-g * (how.logit_scale / how.temperature))[:, None].to(dz.dtype))
    if how.softcap:  # y is divided by the temperature already
        tanh = y.to(dz.dtype) * (how.temperature / how.softcap)
        dz.mul_(1 - tanh * tanh)
    return dz.masked_fill_((g == 0)[:, None], 0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Entropy(torch.autograd.Function):
    ONCE = "the entropy can be differentiated once, not twice"

    @staticmethod
    def forward(rows: Tensor, places: Tensor, value: Tensor, how: Transform) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, places, value, ctx.how = inputs
        ctx.save_for_backward(rows, places, value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, places, value = ctx.saved_tensors
        with torch.no_grad():
            every = len(places) == len(rows)  # in order: `logit_rows` leaves rows out, or none
            make = torch.empty_like if every else torch.zeros_like
            dz = make(rows, memory_format=torch.contiguous_format)
            for chunk in _chunks(len(places), rows.shape[1], CHUNK_BYTES):
                at = chunk if every else places[chunk]
                dz[at] = _slope(rows[at], value[chunk], g[chunk], ctx.how).to(dz.dtype)
        return differentiable_once(dz, g, _Entropy.ONCE), None, None, None


class _LinearEntropy(torch.autograd.Function):
    ONCE = _Entropy.ONCE

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, how: Transform
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.how = inputs
        ctx.set_materialize_grads(False)  # mostly it is logged, and nothing is computed here
        ctx.save_for_backward(*tensors)
        where = inputs[0].device.type
        ctx.dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else None

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 5
        hidden, weight, bias, value = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            dtype = ctx.dtype or hidden.dtype
            sums = torch.float64 if dtype == torch.float64 else torch.float32
            w = weight.to(dtype)
            dx = torch.empty_like(hidden) if need_x else None
            dw = torch.zeros_like(weight, dtype=sums) if need_w else None
            db = None if bias is None or not need_b else torch.zeros_like(bias, dtype=sums)
            for chunk in _chunks(len(hidden), weight.shape[0], HEAD_BYTES):
                x = hidden[chunk].to(dtype)
                z = x @ w.T if bias is None else torch.addmm(bias.to(dtype), x, w.T)
                dz = _slope(z, value[chunk], g[chunk], ctx.how)
                if dx is not None:
                    dx[chunk] = (dz @ w.to(dz.dtype)).to(dx.dtype)
                if dw is not None:
                    dw += dz.T @ x.to(dz.dtype)
                if db is not None:
                    db += dz.sum(0)
        grads = (
            dx,
            None if dw is None else dw.to(weight.dtype),
            None if db is None else db.to(bias.dtype),
        )
        once = [None if d is None else differentiable_once(d, g, _Entropy.ONCE) for d in grads]
        return (*once, None, None)
