"""Rows of the table that look beyond the two sums of a pair: at the batch, or at parts of a
sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import dpo_ext.torch.losses.side_rows  # noqa: F401 - its rows come first
from dpo_ext.torch.losses.forms import Number, Pairs, s, sp
from dpo_ext.torch.losses.row import LOSSES, LossRow, Parameter, finite, positive, u_row

_BETA = Parameter(0.1, "> 0", lambda x: (x > 0) & (x - x == 0), per_pair=False)
_EPS = Parameter(0.0, "in [0, 1]", lambda x: (x >= 0) & (x <= 1), per_pair=False)
_BETA_PRIME = Parameter(1.0, "> 0", lambda x: (x > 0) & (x - x == 0), per_pair=False)


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


def _aot_paired(x: Pairs, beta, label_smoothing):
    loss, slope, _ = _quantiles(x.c - x.r, x.cr - x.rr, beta, label_smoothing)
    return loss, slope, -slope


def _aot_unpaired(x: Pairs, beta, label_smoothing):
    return _quantiles(x.xw, x.xl, beta, label_smoothing)


def _dr_dpo(x: Pairs, beta, beta_prime):
    m = x.m(beta)
    scaled = -sp(-m) / beta_prime
    pairs = len(m)
    loss = -beta_prime * (torch.logsumexp(scaled, 0) - math.log(max(pairs, 1)))
    slope = -beta * s(-m) * (pairs * torch.softmax(scaled, 0))
    return loss.expand(pairs).clone(), slope, -slope


for _name, _formula, _text, _paper, _parameters in (
    (
        "aot_paired",
        _aot_paired,
        "mean of cdpo at beta*(sort(c - r) - sort(cr - rr))",
        "2406.05882",
        {"beta": _BETA, "label_smoothing": _EPS},
    ),
    (
        "aot_unpaired",
        _aot_unpaired,
        "mean of cdpo at beta*(sort(xw) - sort(xl))",
        "2406.05882",
        {"beta": _BETA, "label_smoothing": _EPS},
    ),
    (
        "dr_dpo",
        _dr_dpo,
        "-beta_prime*log mean exp(-dpo/beta_prime); per_pair is this number for every pair",
        "2407.07880",
        {"beta": _BETA, "beta_prime": _BETA_PRIME},
    ),
):
    LOSSES[_name] = LossRow(_name, _formula, _text, _paper, _parameters, couples_batch=True)


@u_row(
    "ld_dpo",
    "u = beta*D of head + ld_alpha*tail; logps and ref_logps are the heads",
    "2409.06411", "R T", "M c r X", ("tail_w", "tail_l"),
    beta=positive(0.1),
    ld_alpha=Parameter(None, "in [0, 1]", lambda x: (x >= 0) & (x <= 1)),
    tail_w=finite(), tail_l=finite(), ref_tail_w=finite(), ref_tail_l=finite(),
)  # fmt: skip
def _(x, beta, ld_alpha, tail_w, tail_l, ref_tail_w, ref_tail_l):
    tail = (tail_w - ref_tail_w) - (tail_l - ref_tail_l)
    slope = beta * ld_alpha
    return x.m(beta) + slope * tail, beta, -beta, {"tail_w": slope, "tail_l": -slope}


def _sft_token_mean(x: Pairs):
    assert x.lengths is not None  # the row says that it needs them; checked before
    mean_length = (
        x.lengths.select(1, 0).to(x.logps.dtype).mean().clamp(min=1 / max(len(x.lengths), 1))
    )
    slope = torch.zeros_like(x.c) - 1 / mean_length
    return x.c * slope, slope, torch.zeros_like(slope)


LOSSES["sft_token_mean"] = LossRow(
    "sft_token_mean",
    _sft_token_mean,
    "L = -c*N/sum(nw): the mean over pairs is the NLL of a token of the batch",
    "TRL's `sft`: its normaliser is the batch's, so gradient accumulation changes it",
    reference=False,
    lengths=True,
    couples_batch=True,
    monotone="cr",
    convex=True,
)
