"""LLaMA-Factory's log-probs of a batch (``llamafactory.train.trainer_utils``), 0.9.0 and later."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ext.compat.parts.rows import HALF, like, shifted_logps

__all__ = ["get_batch_logps"]
IGNORE_INDEX = -100


def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    label_pad_token_id: int = IGNORE_INDEX,
    ld_alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each row's labels, and how many there are.

    Same as LLaMA-Factory's::

        mask = labels[:, 1:] != label_pad_token_id
        ids = labels[:, 1:].masked_fill(~mask, 0)
        logps = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
        return (logps * mask).sum(-1), mask.sum(-1)

    and with ``ld_alpha`` (LD-DPO, arXiv:2409.06411) the tokens of a row behind the first ``n`` of
    its completion count ``ld_alpha``, ``n`` the length of the shorter side of the pair, rows
    ``0..B/2-1`` chosen.

    Args:
        logits: (B, T, V) float32, bfloat16, float16 or float64.
        labels: (B, T) integers.
        label_pad_token_id: the label that is not scored.
        ld_alpha: weight of the tail, or None.

    Returns:
        (B,) sums in the dtype of ``logits`` (float32 for half precision with ``ld_alpha``), and
        (B,) int64 numbers of scored tokens.

    Raises:
        ValueError: shapes differ.  TensorError: another dtype; on the CPU an id outside [0, V).

    Numerics: float32 inside, rounded once. Rows that are not scored are not read: NaN there stays
    there, where theirs multiplies it by 0 and gives NaN. Kept as theirs: a position counts as the
    head by its distance from the first scored label, so a hole in the labels (a masked turn) moves
    the border; and the reference is not weighted unless it passes through here too.

    >>> get_batch_logps(torch.zeros(2, 3, 4), torch.tensor([[-100, 1, 2], [-100, 3, -100]]))
    (tensor([-2.7726, -1.3863]), tensor([2, 1]))
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError("Logits (batchsize x seqlen) and labels must have the same shape.")
    grid, mask = shifted_logps(logits, labels, label_pad_token_id)
    lengths = mask.sum(-1)
    if ld_alpha is None:
        return like(grid.sum(-1), logits.dtype), lengths
    N = len(labels) // 2
    shorter = torch.minimum(lengths[:N], lengths[N:]).repeat(2)
    end = mask.int().argmax(1) + shorter
    head = torch.arange(mask.shape[1], device=mask.device) < end[:, None]
    front, rear = (torch.where(part, grid, 0.0).sum(-1) for part in (head, ~head))
    dtype = torch.float32 if logits.dtype in HALF else logits.dtype
    return like(front + ld_alpha * rear, dtype), lengths
