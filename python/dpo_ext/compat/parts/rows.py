"""Logits of any shape as rows, and a token of each row: what the peers' signatures mean to ours.

Letters: R rows, V vocabulary, M tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable
from dpo_ext.torch.logps.logits import token_scores
from dpo_ext.torch.logps.scores import TokenScores, check_plain
from dpo_ext.torch.numbers import host_values
from dpo_ext.torch.once import differentiable_once

NOT_A_TOKEN = -1  # its log-prob is NaN where nobody may look at values
HALF = (torch.bfloat16, torch.float16)


def like(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value in the dtype that a peer gives; no node of the graph where it has it."""
    return value if value.dtype == dtype else value.to(dtype)


def as_targets(ids: Tensor, scored: Tensor | None, name: str) -> Tensor:
    """(M,) int32, -100 where not scored; an id below 0 that is scored is an error, NaN on a GPU."""
    targets = ids.reshape(-1)
    wrong = targets < 0
    if scored is not None:
        wrong = wrong & scored.reshape(-1)
    if host_values(targets) and bool(wrong.any()):
        raise TensorError(f"`{name}` must hold ids of tokens, found {int(targets[wrong][0])}")
    targets = targets.masked_fill(wrong, NOT_A_TOKEN)
    if scored is not None:
        targets = targets.masked_fill(~scored.reshape(-1), IGNORE_INDEX)
    return targets.to(torch.int32)


def table_of(rows: Tensor, targets: Tensor) -> ScoreTable:
    """A table of M tokens as one sequence; nothing is compared and no device is waited for."""
    offsets = torch.tensor([0, targets.shape[0]], dtype=torch.int32)
    on_device = offsets if targets.device.type == "cpu" else offsets.to(targets.device)
    return ScoreTable.unchecked(rows, targets, on_device, offsets, group_size=1)


def logit_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(R, V) that shares memory with logits (..., V) if it can, and the row (M,) of each position.

    ``logits[:, :-1]`` has rows of one stride too, only some of them are left out.
    """
    V, shape = logits.shape[-1], logits.shape[:-1]
    positions = torch.arange(shape.numel(), device=logits.device)
    if logits.dim() == 2:
        return logits, positions
    if logits.dim() == 3 and not logits.is_contiguous() and logits.stride(2) == 1 and min(shape):
        B, T = shape
        s0, s1 = logits.stride(0), logits.stride(1)
        if s1 >= V and s0 % s1 == 0 and s0 // s1 >= T:
            k = s0 // s1
            steps = torch.arange(B, device=logits.device)[:, None] * k
            rows = (steps + torch.arange(T, device=logits.device)).reshape(-1)
            return _AsRows.apply(logits, k), rows
    return logits.reshape(-1, V), positions


class _AsRows(torch.autograd.Function):
    """(B, T, V) with k >= T rows between the first ones of two batches -> ((B-1)*k + T, V).

    Autograd's own gradient of `as_strided` adds two passes over memory of the logits' size.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int) -> Tensor:
        (B, T, V), ctx.k = logits.shape, k
        ctx.shape = logits.shape
        return logits.as_strided(((B - 1) * k + T, V), (logits.stride(1), 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        V = ctx.shape[2]
        with torch.no_grad():
            dense = grad.contiguous().as_strided(ctx.shape, (ctx.k * V, V, 1))
        return differentiable_once(dense, grad), None


def check_ids(logits: Tensor, ids: Tensor, name: str, what: str = "logits") -> None:
    """Ids (...) for logits (..., V), plain tensors both."""
    check_plain(what, logits)
    check_plain(name, ids)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TensorError(f"`{name}` must hold integers, found {describe(ids)}")
    if not logits.dim() or logits.shape[:-1] != ids.shape:
        wanted = tuple(logits.shape[:-1])
        raise TensorError(f"`{name}` must have shape {wanted}, found {tuple(ids.shape)}")


def row_scores(
    logits: Tensor,
    ids: Tensor,
    *,
    scored: Tensor | None = None,
    temperature: float = 1.0,
    stats: Iterable[str] = (),
    inplace_grad: bool = False,
    name: str = "index",
) -> TokenScores:
    """Scores of ``ids`` (...) under logits (..., V), of their shape; 0 where not ``scored``."""
    check_ids(logits, ids, name)
    rows, place = logit_rows(logits)
    table = table_of(place, as_targets(ids, scored, name))
    out = token_scores(rows, table, stats=stats, temperature=temperature, inplace_grad=inplace_grad)
    rest = (None if x is None else x.reshape(ids.shape) for x in out[1:])
    return TokenScores(out.logps.reshape(ids.shape), *rest)


def shifted_logps(logits: Tensor, labels: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """(B, T-1) log-probs of ``labels[:, 1:]``, 0 where they are ``pad``, and where they are not."""
    mask = labels[:, 1:] != pad
    T = labels.shape[1]
    ids = torch.nn.functional.pad(labels[:, 1:], (0, min(T, 1)), value=pad)
    scored = torch.nn.functional.pad(mask, (0, min(T, 1)), value=False)
    logps = row_scores(logits, ids, scored=scored, name="labels").logps
    return logps[:, : mask.shape[1]], mask
