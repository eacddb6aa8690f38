"""Losses of pairs as the peers call them: four tensors of log-probs, of any shape and dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.compat.parts.rows import HALF, like
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.losses.node import Bound, PairLoss, Pairs
from dpo_ext.torch.once import node


def pair_losses(
    sides: tuple[Tensor, Tensor],
    reference: tuple[Tensor | float, Tensor | float],
    loss: str,
    **params: Any,
) -> Tensor:
    """The loss of each pair, of the shape that the four broadcast to, in the dtype of their sum.

    A row of the table without the checks at its door: no domain, and NaN gives NaN, as a peer does.
    A reference that asks for a gradient gets one, which our own losses refuse.
    """
    given = [x if isinstance(x, Tensor) else sides[0].new_tensor(x) for x in (*sides, *reference)]
    dtype = torch.result_type(given[0] - given[1], given[2] - given[3])
    c, r, ref_c, ref_r = torch.broadcast_tensors(*given)
    shape, wide = c.shape, torch.float32 if dtype in HALF else dtype
    c, r, ref_c, ref_r = (x.reshape(-1).to(wide) for x in (c, r, ref_c, ref_r))
    if ref_c.requires_grad or ref_r.requires_grad:
        c, r = c - ref_c, r - ref_r
        ref_c = ref_r = torch.zeros_like(c)
    logps = torch.stack((c, r), 1)
    row = find_loss(loss)
    numbers = {k: v if isinstance(v, Tensor) else float(v) for k, v in params.items()}
    pairs = Pairs(torch.stack((ref_c, ref_r), 1).detach(), None, None, float(len(c) or 1), None)
    _, per_pair, *_ = node(PairLoss, logps, pairs, Bound(row, numbers))
    return like(per_pair.reshape(shape), dtype)


def smoothed(
    sides: tuple[Tensor, Tensor],
    reference: tuple[Tensor | float, Tensor | float],
    *,
    beta: float,
    label_smoothing: float,
    ipo: bool = False,
) -> Tensor:
    """DPO with label smoothing (Mitchell's note, eq. 3), or IPO of sums (arXiv:2310.12036, 17)."""
    if ipo:
        return pair_losses(sides, reference, "ipo_sum", beta=beta)
    return pair_losses(sides, reference, "cdpo", beta=beta, label_smoothing=label_smoothing)


def rewards(
    sides: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float
) -> tuple[Tensor, Tensor]:
    """``beta * (logps - ref_logps)`` of chosen and rejected, without gradient."""
    chosen, rejected = (beta * (p - q).detach() for p, q in zip(sides, reference, strict=True))
    return chosen, rejected
