"""The slow formula of each function of `dpo_ext.compat`, with the signature that it has there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dpo_ext.compat.trl import OPTIONAL_OUTPUTS


def gathered(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def slow_selective(logits, index, temperature=1.0, row_mask=None):
    logps = (logits / temperature).log_softmax(-1)
    if index.dim() < logits.dim():
        logps = logps.gather(-1, index[..., None])[..., 0]
    else:
        logps = logps.gather(-1, index)
    return logps if row_mask is None else torch.where(row_mask != 0, logps, 0.0)


def slow_entropy(logits, chunk_size=128):
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def slow_both(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
    logits = logits / temperature
    entropy = slow_entropy(logits)
    if row_mask is not None:
        entropy = torch.where(row_mask != 0, entropy, 0.0)
    if not entropy_requires_grad:
        entropy = entropy.detach()
    return slow_selective(logits, index, row_mask=row_mask), entropy


def slow_head(
    hidden,
    weight,
    bias,
    targets,
    temperature,
    chunk_size,
    cap=None,
    logit_scale=1.0,
    outputs=OPTIONAL_OUTPUTS,
):
    y = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    y = y * logit_scale
    y = (y if cap is None else cap * torch.tanh(y / cap)) / temperature
    logps = y.log_softmax(-1)
    p = logps.detach().exp()
    out = {
        "entropy": slow_entropy(y),
        "log_sum_sq_probs": (p * p).sum(-1).log(),
        "mean_logits": y.detach().mean(-1),
        "is_top1": y.argmax(-1) == targets,
    }
    first = logps.gather(-1, targets[:, None])[:, 0]
    return first, *(out[name] if name in outputs else None for name in OPTIONAL_OUTPUTS)


def slow_shifted(logits, labels, pad=-100):
    mask = labels[:, 1:] != pad
    return gathered(logits[:, :-1], labels[:, 1:].masked_fill(~mask, 0)) * mask, mask


def slow_llamafactory(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    logps, mask = slow_shifted(logits, labels, label_pad_token_id)
    lengths = mask.sum(-1)
    if ld_alpha is None:
        return logps.sum(-1), lengths
    rows, N = [], len(labels) // 2
    for i in range(len(labels)):
        shorter = min(int(lengths[i]), int(lengths[(i + N) % (2 * N)]))
        start = int(mask[i].int().argmax())
        at = torch.arange(mask.shape[1]) < start + shorter
        rows.append((logps[i] * torch.where(at, 1.0, ld_alpha * torch.ones_like(logps[i]))).sum())
    return torch.stack(rows), lengths


def slow_mean(name, small=0.0):
    def slow(logits, labels, pad=-100, average=False, **other):
        average = other.get(name, average)
        logps, mask = slow_shifted(logits, labels, other.get("label_pad_token_id", pad))
        return logps.sum(-1) / (mask.sum(-1) + small) if average else logps.sum(-1)

    return slow


def slow_pairs(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
    label_smoothing=0.0,
    ipo=False,
    reference_free=False,
):
    c, r, cr, rr = (
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    h = (c - r) - (0 if reference_free else cr - rr)
    if ipo:
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = (1 - label_smoothing) * F.softplus(-beta * h) + label_smoothing * F.softplus(
            beta * h
        )
    return losses, (beta * (c - cr)).detach(), (beta * (r - rr)).detach()


def slow_packed(per_token_logps, labels, cu_seq_lens, average_log_prob=False):
    sums = []
    for start, end in zip(cu_seq_lens[:-1].tolist(), cu_seq_lens[1:].tolist(), strict=True):
        at = [t for t in range(max(start - 1, 0), end - 1) if labels[0, t + 1] != -100]
        total = per_token_logps[0, at].sum()
        sums.append(total / max(len(at), 1) if average_log_prob else total)
    return torch.stack(sums)


def slow_rows(per_token_logps, labels, average_log_prob=False):
    mask = labels[:, 1:] != -100
    sums = (per_token_logps[:, :-1] * mask).sum(-1)
    return sums / mask.sum(-1).clamp(min=1) if average_log_prob else sums


def slow_linear_cross_entropy(
    input,
    linear_weight,
    target,
    *,
    linear_bias=None,
    weight=None,
    reduction="mean",
    ignore_index=None,
    label_smoothing=0.0,
    options=None,
):
    shape = (*input.shape[:-1], *linear_weight.shape[:-1])
    flat = linear_weight.reshape(-1, linear_weight.shape[-1])
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, flat, bias).reshape(shape)
    index = -100 if ignore_index is None else ignore_index
    return F.cross_entropy(
        logits,
        target,
        weight=weight,
        reduction=reduction,
        ignore_index=index,
        label_smoothing=label_smoothing,
    )
