"""open-instruct's log-probs: ``model_utils``, ``dpo_utils``, ``padding_free_collator`` (2026)."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ext.compat.parts.rows import like, row_scores

__all__ = ["_get_batch_logps", "get_batch_logps", "log_softmax_and_gather"]


def log_softmax_and_gather(logits: Tensor, index: Tensor) -> Tensor:
    """Log-prob of one token of each row of logits (``open_instruct.model_utils``).

    Same as theirs, without its compilation::

        logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64.
        index: (...) ids in [0, V).

    Returns:
        The shape of ``index``, the dtype of ``logits``.

    Raises:
        TensorError: shape or dtype is not as above; on the CPU an id outside [0, V).

    Numerics: float32 inside for half precision, rounded once.

    >>> log_softmax_and_gather(torch.zeros(1, 2, 4), torch.tensor([[1, 3]]))
    tensor([[-1.3863, -1.3863]])
    """
    return like(row_scores(logits, index).logps, logits.dtype)


def _get_batch_logps(
    per_token_logps: Tensor, labels: Tensor, average_log_prob: bool = False
) -> Tensor:
    """Sum or average of each row's log-probs over its scored tokens (``open_instruct.dpo_utils``).

    Same as theirs::

        mask = labels[:, 1:] != -100
        (per_token_logps[:, :-1] * mask).sum(-1)               # / mask.sum(-1).clamp(min=1)

    Args:
        per_token_logps: (B, T), position t holds the log-prob of ``labels[:, t + 1]``.
        labels: (B, T), -100 not scored.
        average_log_prob: divide by the number of scored tokens, at least 1.

    Returns:
        (B,) in the dtype of ``per_token_logps``.

    Numerics: selected, not multiplied: NaN and infinities of tokens that are not scored stay there,
    where theirs gives NaN.

    >>> _get_batch_logps(torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[-100, 5, 6]]))
    tensor([-3.])
    """
    mask = labels[:, 1:] != -100
    sums = torch.where(mask, per_token_logps[:, :-1], 0.0).sum(-1)
    return sums / mask.sum(-1).clamp(min=1) if average_log_prob else sums


def get_batch_logps(
    per_token_logps: Tensor, labels: Tensor, cu_seq_lens: Tensor, average_log_prob: bool = False
) -> Tensor:
    """The same of sequences packed into one row (``open_instruct.padding_free_collator``).

    Same as theirs: position t belongs to the sequence of ``labels[0, t + 1]``, of which
    ``cu_seq_lens`` holds the borders.

    Args:
        per_token_logps, labels: (1, T), as in `_get_batch_logps`.
        cu_seq_lens: (S+1,) integers, from 0 to T.
        average_log_prob: divide by the number of scored tokens, at least 1.

    Returns:
        (S,) in the dtype of ``per_token_logps``, float32 at least.

    Raises:
        IndexError, RuntimeError: torch's, for other shapes.

    Numerics: as `_get_batch_logps`. Kept as theirs: what lies behind the last border counts for the
    last sequence.

    >>> borders = torch.tensor([0, 2, 4])
    >>> logps, labels = torch.tensor([[-1.0, -2.0, -4.0, 0]]), torch.tensor([[0, 5, 6, 7]])
    >>> get_batch_logps(logps, labels, borders)
    tensor([-1., -6.])
    """
    mask = labels[0, 1:] != -100
    logps = torch.where(mask, per_token_logps[0, :-1], 0.0)
    logps = like(logps, torch.promote_types(logps.dtype, torch.float32))
    ends = cu_seq_lens[1:] - 1
    S = len(ends)
    place = torch.arange(len(logps), device=cu_seq_lens.device)
    of = torch.bucketize(place, ends, right=True).clamp(max=S - 1)
    sums = logps.new_zeros(S).index_add(0, of, logps)
    if not average_log_prob:
        return sums
    counts = logps.new_zeros(S).index_add(0, of, mask.to(logps.dtype))
    return sums / counts.clamp(min=1)
