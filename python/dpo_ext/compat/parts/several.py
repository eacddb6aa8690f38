"""Log-probs of K tokens of each row: the kernels' tables name a row once.

Letters: R rows, V vocabulary, K tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.compat.parts.rows import logit_rows
from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.logps import twin
from dpo_ext.torch.logps.scores import Transform, uses_kernels
from dpo_ext.torch.numbers import host_values
from dpo_ext.torch.once import differentiable_once, node

CHUNK_BYTES = 64_000_000


def several_logps(logits: Tensor, index: Tensor, how: Transform) -> Tensor:
    """(..., K) log-probs of ``index`` (..., K) under logits (..., V), in float32 or float64."""
    if index.is_floating_point() or index.shape[:-1] != logits.shape[:-1]:
        wanted = (*logits.shape[:-1], "K")
        raise TensorError(f"`index` must be integers {wanted}, found {describe(index)}")
    V = logits.shape[-1]
    outside = (index < 0) | (index >= V)
    if host_values(index) and bool(outside.any()):
        raise TensorError(f"`index` must be in [0, {V}), found {int(index[outside][0])}")
    ids = index.clamp(0, max(V - 1, 0)).long().reshape(-1, index.shape[-1])
    if not uses_kernels(logits.dtype, logits.device.type, "auto"):
        y = twin.transform(logits.reshape(-1, V), *how).log_softmax(-1)
        logps = y.gather(-1, ids)
    else:
        rows, places = logit_rows(logits)
        logps, _ = node(_Several, rows, places, ids, how)
    return logps.reshape(index.shape).masked_fill(outside, torch.nan)


class _Several(torch.autograd.Function):
    """``y - lse(y)`` at K places of each row; lse from the kernels' fold."""

    @staticmethod
    def forward(rows: Tensor, places: Tensor, ids: Tensor, how: Transform) -> tuple[Tensor, Tensor]:
        first = torch.zeros(len(places), dtype=torch.int32, device=rows.device)
        out = torch.ops.dpo_ext.token_stats(rows, places, first, *how, False)
        largest, rest = out[1], out[2]  # of the row, and the sum without id 0
        lse = largest + (rest + (twin.transform(rows[places, 0], *how) - largest).exp()).log()
        y = twin.transform(rows[places[:, None], ids], *how)
        return y - lse[:, None], lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, places, ids, ctx.how = inputs
        ctx.save_for_backward(rows, places, ids, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        rows, places, ids, lse = ctx.saved_tensors
        step = max(CHUNK_BYTES // (4 * max(rows.shape[1], 1)), 1)
        with torch.no_grad():
            dz = torch.zeros_like(rows, memory_format=torch.contiguous_format)
            for start in range(0, len(places), step):
                part = slice(start, start + step)
                at = places[part]
                with torch.enable_grad():
                    leaf = rows[at].requires_grad_()
                    y = twin.transform(leaf, *ctx.how)
                dy = (y.detach() - lse[part, None]).exp() * -g[part].sum(1, keepdim=True)
                dy.scatter_add_(1, ids[part], g[part])
                (made,) = torch.autograd.grad(y, leaf, dy)
                dz[at] = made.to(dz.dtype)
        return differentiable_once(dz, g), None, None, None
