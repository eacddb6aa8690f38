"""Rows of the table that look beyond the two sums of a pair: at the batch, or at parts of a
sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo_ext.torch.losses.forms import Number, Symbols, s, sp
from dpo_ext.torch.losses.row import LossRow, closed_unit, finite, plain_row, positive, u_row

ROWS: dict[str, LossRow] = {}


def _quantiles(u: Tensor, v: Tensor, beta: Number, label_smoothing: Number):
    """`cdpo` of the sorted ``u`` against the sorted ``v``: loss and slopes, in the order of the
    pairs.

    Sorted stably, so that ties share their slopes in the order of the batch.
    """
    u_sorted, by_u = torch.sort(u, stable=True)
    v_sorted, by_v = torch.sort(v, stable=True)
    m = beta * (u_sorted - v_sorted)
    loss, slope = sp(-m) + label_smoothing * m, beta * (label_smoothing - s(-m))
    zero = torch.zeros_like(u)
    return zero.scatter(0, by_u, loss), zero.scatter(0, by_u, slope), zero.scatter(0, by_v, -slope)


@plain_row(
    ROWS,
    "mean of cdpo at beta*(sort(c - r) - sort(cr - rr))",
    "2406.05882",
    needs="reference couples_batch",
    beta=positive(0.1, per_pair=False),
    label_smoothing=closed_unit(0.0, per_pair=False),
)
def aot_paired(x: Symbols, beta, label_smoothing):
    loss, slope, _ = _quantiles(x.c - x.r, x.cr - x.rr, beta, label_smoothing)
    return loss, slope, -slope


@plain_row(
    ROWS,
    "mean of cdpo at beta*(sort(xw) - sort(xl))",
    "2406.05882",
    needs="reference couples_batch",
    beta=positive(0.1, per_pair=False),
    label_smoothing=closed_unit(0.0, per_pair=False),
)
def aot_unpaired(x: Symbols, beta, label_smoothing):
    return _quantiles(x.xw, x.xl, beta, label_smoothing)


@plain_row(
    ROWS,
    "-beta_prime*log mean exp(-dpo/beta_prime); per_pair is this number for every pair",
    "2407.07880",
    needs="reference couples_batch",
    beta=positive(0.1, per_pair=False),
    beta_prime=positive(1.0, per_pair=False),
)
def dr_dpo(x: Symbols, beta, beta_prime):
    m = x.m(beta)
    scaled = -sp(-m) / beta_prime
    pairs = len(m)
    loss = -beta_prime * (torch.logsumexp(scaled, 0) - math.log(max(pairs, 1)))
    slope = -beta * s(-m) * (pairs * torch.softmax(scaled, 0))
    return loss.expand(pairs).clone(), slope, -slope


@u_row(
    ROWS,
    "u = beta*D of head + ld_alpha*tail; logps and ref_logps are the heads",
    "2409.06411",
    needs="reference statistics",
    shape="only_margin falls_in_chosen rises_in_rejected convex",
    differentiable=("tail_w", "tail_l"),
    beta=positive(0.1),
    ld_alpha=closed_unit(),
    tail_w=finite(),
    tail_l=finite(),
    ref_tail_w=finite(),
    ref_tail_l=finite(),
)
def ld_dpo(x: Symbols, beta, ld_alpha, tail_w, tail_l, ref_tail_w, ref_tail_l):
    tail = (tail_w - ref_tail_w) - (tail_l - ref_tail_l)
    slope = beta * ld_alpha
    return x.m(beta) + slope * tail, beta, -beta, {"tail_w": slope, "tail_l": -slope}


@plain_row(
    ROWS,
    "L = -c*N/sum(nw): the mean over pairs is the NLL of a token of the batch",
    "TRL's `sft`: its normaliser is the batch's, so gradient accumulation changes it",
    needs="lengths couples_batch",
    shape="falls_in_chosen rises_in_rejected convex",
)
def sft_token_mean(x: Symbols):
    assert x.lengths is not None  # the row says that it needs them; checked before
    mean_length = (
        x.lengths.select(1, 0).to(x.logps.dtype).mean().clamp(min=1 / max(len(x.lengths), 1))
    )
    slope = torch.zeros_like(x.c) - 1 / mean_length
    return x.c * slope, slope, torch.zeros_like(slope)
