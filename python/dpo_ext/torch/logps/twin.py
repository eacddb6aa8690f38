"""The readable twin of the log-prob kernels: plain torch, plain autograd, any float dtype.

What the kernels of ``dpo_ext.torch.logps.ops`` compute is defined as equal to this file. It spends
several (M, V) buffers where they spend none. One difference: where a scored row holds NaN and its
upstream gradient is 0, plain autograd gives NaN here and the kernels give 0.

Letters: R rows, V vocabulary, M tokens, S sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo_ext.layout.table import IGNORE_INDEX


def transform(z: Tensor, logit_scale: float, softcap: float, temperature: float) -> Tensor:
    """``y = logit_scale * z``, capped to ``softcap * tanh(y / softcap)``, over ``temperature``.

    ``softcap = 0`` means none. bfloat16 and float16 are computed in float32.
    """
    y = (z.float() if z.dtype in (torch.bfloat16, torch.float16) else z) * logit_scale
    if softcap:
        y = softcap * torch.tanh(y / softcap)
    return y / temperature


def token_stats(
    logits: Tensor,
    logit_rows: Tensor,
    targets: Tensor,
    logit_scale: float,
    softcap: float,
    temperature: float,
    stats: bool,
) -> tuple[Tensor, ...]:
    """``(logps, entropy, mean_logit, log_sum_sq, is_top1)``, (M,) each; a gradient for logps alone.

    ::

        m = max_v y_v    S = sum_v exp(y_v - m)    p_v = exp(y_v - m) / S
        logp = (y_t - m) - log S                   log_sum_sq = log sum_v p_v^2
        mean_logit = mean_v y_v                    entropy = log S - sum_v p_v (y_v - m)

    float32, or float64 for float64 logits. A target of -100 gives 0, its row has no influence and
    gets no gradient; a target outside [0, V) or a row outside [0, R) gives NaN. Without ``stats``
    the last four are empty.
    """
    R, V = logits.shape
    if not (R and V):
        logits = torch.nn.functional.pad(logits, (0, int(not V), 0, int(not R)))
    scored = targets != IGNORE_INDEX
    exists = scored & (logit_rows >= 0) & (logit_rows < R)
    valid = exists & (targets >= 0) & (targets < V)
    # Select, never multiply: NaN in a row that is not scored goes nowhere, forward or backward.
    z = torch.where(exists[:, None], logits[torch.where(exists, logit_rows, 0)], 0.0)
    y = transform(z, logit_scale, softcap, temperature)
    t = torch.where(valid, targets, 0).long()[:, None]
    m = y.detach().amax(-1, keepdim=True)
    shifted = y - m
    e = shifted.exp()
    answer = torch.where(valid, 1.0, math.nan)  # what does not exist is NaN, and so is its gradient
    logps = (shifted.gather(1, t)[:, 0] - e.sum(-1).log()) * answer
    logps = torch.where(scored, logps, 0.0)
    if not stats:
        return (logps, *(logps.detach()[:0] for _ in range(3)), scored[:0])
    with torch.no_grad():
        total = e.sum(-1)
        # 0 log 0 = 0: exp is 0 where y - m is very negative or -inf
        entropy = total.log() - torch.where(e > 0, e * shifted, 0.0).sum(-1) / total
        mean_logit = y.mean(-1)
        log_sum_sq = (e * e).sum(-1).log() - 2.0 * total.log()
        is_top1 = valid & (y.argmax(-1) == t[:, 0]) & m[:, 0].isfinite()
    rest = (torch.where(scored, x * answer, 0.0) for x in (entropy, mean_logit, log_sum_sq))
    return (logps, *rest, is_top1)


def segment_sum(values: Tensor, weights: Tensor | None, seq_offsets: Tensor) -> Tensor:
    """(S,) sums of ``weights * values`` over each sequence, added in float64, in the values' dtype.

    A weight of exactly 0 selects nothing, not even NaN.
    """
    terms = values.double()
    if weights is not None:
        terms = torch.where(weights != 0, torch.where(weights != 0, terms, 0.0) * weights, 0.0)
    sums = torch.segment_reduce(
        terms, "sum", offsets=seq_offsets.long(), axis=0, unsafe=True, initial=0.0
    )
    return sums.to(values.dtype)
