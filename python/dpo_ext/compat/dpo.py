"""The original DPO code (``trainers.py`` of eric-mitchell/direct-preference-optimization)."""

from __future__ import annotations

from torch import Tensor

from dpo_ext.compat.parts.margins import rewards, smoothed
from dpo_ext.compat.parts.rows import like, shifted_logps

__all__ = ["_get_batch_logps", "preference_loss"]


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO (or conservative DPO, or IPO) of each pair, and its rewards.

    Same as theirs::

        h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        l = (1 - label_smoothing) * -logsigmoid(beta * h) + label_smoothing * -logsigmoid(-beta * h)
        l = (h - 1 / (2 * beta)) ** 2                                                       # ipo
        l, (beta * (policy_chosen - reference_chosen)).detach(), ...

    arXiv:2305.18290, eq. 7; Mitchell's 2023 note, eq. 3; arXiv:2310.12036, eq. 17.

    Args:
        policy_chosen_logps, ...: (N,) sums of log-probs, any floating dtype.
        beta, label_smoothing: the strength, and the share of pairs that are labelled wrong.
        ipo: the squared loss, of sums; it ignores ``label_smoothing``.
        reference_free: the loss takes 0 for the reference. The rewards still subtract it: theirs,
            and kept.

    Returns:
        Losses, rewards of the chosen, rewards of the rejected: (N,) each, the last two detached.

    Numerics: the gradient in closed form; float32 inside for half precision.

    >>> from torch import tensor
    >>> zero = tensor([-1.5])
    >>> preference_loss(tensor([-1.0]), tensor([-2.0]), zero, zero, 0.1)
    (tensor([0.6444]), tensor([0.0500]), tensor([-0.0500]))
    """
    sides = (policy_chosen_logps, policy_rejected_logps)
    reference = (reference_chosen_logps, reference_rejected_logps)
    losses = smoothed(
        sides,
        (0.0, 0.0) if reference_free else reference,
        beta=beta,
        label_smoothing=label_smoothing,
        ipo=ipo,
    )
    return losses, *rewards(sides, reference, beta)


def _get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    """Log-prob of each row's labels, summed or averaged over the scored tokens.

    Same as theirs::

        mask = labels[:, 1:] != -100
        ids = labels[:, 1:].masked_fill(~mask, 0)
        logps = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
        (logps * mask).sum(-1)                                 # / mask.sum(-1) for the average

    Args:
        logits: (B, T, V) float32, bfloat16, float16 or float64.
        labels: (B, T) ids, -100 not scored.
        average_log_prob: divide by the number of scored tokens.

    Returns:
        (B,) in the dtype of ``logits``; the average of no token is NaN, as theirs.

    Raises:
        AssertionError: shapes differ.  TensorError: another dtype; on the CPU an id outside [0, V).

    Numerics: float32 inside, rounded once. Rows that are not scored are not read: NaN there stays
    there, where theirs multiplies it by 0 and gives NaN.

    >>> import torch
    >>> _get_batch_logps(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]), average_log_prob=True)
    tensor([-1.3863])
    """
    if logits.shape[:-1] != labels.shape:
        raise AssertionError(
            f"`labels` must have shape {tuple(logits.shape[:-1])}, found {tuple(labels.shape)}"
        )
    grid, mask = shifted_logps(logits, labels, -100)
    sums = grid.sum(-1)
    return like(sums / mask.sum(-1) if average_log_prob else sums, logits.dtype)
