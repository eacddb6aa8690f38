"""The head inside, as the peers call it: hidden states, a weight, ids beside them.

Letters: B rows, T columns, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ext.compat.parts.rows import as_targets, table_of
from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.logps.linear import linear_token_scores
from dpo_ext.torch.logps.scores import check_plain

LIGER = ("_input", "lin_weight", "target")


class Head(NamedTuple):
    """Hidden states of one model and the head that multiplies them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def check_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, names: tuple[str, ...] = LIGER
) -> None:
    """Hidden (B, T, H), weight (V, H) and labels (B, T)."""
    for name, value in zip(names, (hidden, weight, labels), strict=True):
        check_plain(name, value)
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise TensorError(
            f"`{names[2]}` must have the shape (B, T) of `{names[0]}` (B, T, H), found "
            f"{tuple(labels.shape)} beside {tuple(hidden.shape)}"
        )
    if labels.is_floating_point():
        raise TensorError(f"`{names[2]}` must hold integers, found {describe(labels)}")


def token_grid(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scored: Tensor,
    *,
    chunk_rows: int | None = None,
    compact: bool = True,
    name: str = "target",
) -> Tensor:
    """(B, T) log-probs of labels that stand where they are predicted, 0 where not ``scored``.

    With ``compact`` rows that are not scored do not reach the product; to learn how many are waits
    for a device.
    """
    flat = scored.reshape(-1)
    if compact:
        rows = flat.nonzero()[:, 0]
        targets = as_targets(labels.reshape(-1)[rows], None, name)
    else:
        rows = torch.arange(flat.shape[0], device=flat.device)
        targets = as_targets(labels, scored, name)
    table = table_of(rows, targets)
    weight = weight.to(hidden.dtype) if _mixed(hidden, weight) else weight
    bias = None if bias is None else bias.to(weight.dtype)
    x = hidden.reshape(-1, hidden.shape[-1])
    logps = linear_token_scores(x, weight, table, bias=bias, chunk_rows=chunk_rows).logps
    grid = logps.new_zeros(flat.shape[0]).index_put((rows,), logps) if compact else logps
    return grid.reshape(labels.shape)


def _mixed(hidden: Tensor, weight: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(hidden.device.type)
    return weight.dtype != hidden.dtype and not autocast


def logit_total(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """``(hidden[rows] @ weight.T + bias).sum()`` in float32, without the product of R x H x V."""
    with torch.no_grad():
        x = hidden[rows].reshape(-1, hidden.shape[-1])
        total = x.sum(0, dtype=torch.float64) @ weight.sum(0, dtype=torch.float64)
        if bias is not None:
            total = total + len(x) * bias.sum(dtype=torch.float64)
        return total.float()


def per_row(grid: Tensor, scored: Tensor, average: bool) -> Tensor:
    """(B,) sums or averages over the scored tokens; the average of none is NaN, as a peer's."""
    sums = grid.sum(-1)
    return sums / scored.sum(-1) if average else sums
