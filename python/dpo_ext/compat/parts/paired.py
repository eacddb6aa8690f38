"""Log-probs of both sides of pairs from hidden states, with what Liger returns beside them.

N pairs, B = 2N rows, chosen first; T columns, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ext.compat.parts.heads import Head, check_head, logit_total, per_row, token_grid
from dpo_ext.errors import TensorError


class PairLogps(NamedTuple):
    """Log-probs of both sides and what Liger returns beside them."""

    chosen: Tensor
    rejected: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    nll: Tensor

    def values(self, *more: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.detach().float() for value in (*self, *more))


def pair_logps(
    head: Head,
    target: Tensor,
    ignore_index: int,
    *,
    average: bool,
    nll: bool,
    nll_target: Tensor | None = None,
) -> PairLogps:
    check_head(head.hidden, head.weight, target)
    N, (B, T, _) = target.shape[0] // 2, head.hidden.shape
    if B % 2:
        raise TensorError(f"`target` must have a row for each side of a pair, found {B} rows")
    scored = target != ignore_index
    wanted = target if nll_target is None else nll_target
    for_nll = (wanted[:N] != ignore_index) if nll else torch.zeros_like(scored[:N])
    labels, union = target, scored
    shared = True
    if nll and nll_target is not None:
        shared = not bool((scored[:N] & for_nll & (target[:N] != wanted[:N])).any())
    if nll and nll_target is not None and shared:  # one token of a row says both
        only = for_nll & ~scored[:N]
        labels = torch.cat((torch.where(only, wanted[:N], target[:N]), target[N:]))
        union = torch.cat((scored[:N] | for_nll, scored[N:]))
    grid = token_grid(*head, labels, union)
    logps = per_row(torch.where(scored, grid, 0.0), scored, average)
    of_nll = grid[:N]
    if not shared:
        of_nll = token_grid(head.hidden[:N], head.weight, head.bias, wanted[:N], for_nll)
    total = torch.where(for_nll, of_nll, 0.0).sum()
    count = (wanted[:N] != ignore_index).sum()
    V = head.weight.shape[0]
    is_chosen = torch.arange(B, device=target.device) < N
    chosen, rejected = (logit_total(*head, side) / (N * T * V) for side in (is_chosen, ~is_chosen))
    return PairLogps(logps[:N], logps[N:], chosen, rejected, -total / count)


def reference_logps(head: Head, target: Tensor, ignore_index: int, average: bool) -> Tensor:
    """(B,) log-probs of the reference, without a graph."""
    for name, value in (("ref_input", head.hidden), ("ref_weight", head.weight)):
        if value is None:
            raise TensorError(
                f"`{name}` is missing: `use_ref_model=True` needs the reference's hidden states "
                "and weight\nhint: use_ref_model=False takes log-probs of 0"
            )
    check_head(head.hidden, head.weight, target, names=("ref_input", "ref_weight", "target"))
    scored = target != ignore_index
    with torch.no_grad():
        return per_row(token_grid(*head, target, scored), scored, average)


def mean(losses: Tensor) -> Tensor:
    return losses.sum() / len(losses)
