"""torchtune's log-probs of a batch and its DPO loss (``torchtune.rlhf``), 0.6.

In 0.5 the average has no 1e-8: NaN for a row without tokens, and in half precision rounded to it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpo_ext.compat.parts.margins import rewards, smoothed
from dpo_ext.compat.parts.rows import like, shifted_logps

__all__ = ["DPOLoss", "get_batch_log_probs"]
CROSS_ENTROPY_IGNORE_IDX = -100
_TINY = 1e-8  # torchtune adds it to the number of tokens


def get_batch_log_probs(
    logits: Tensor,
    labels: Tensor,
    label_pad_token_id: int = CROSS_ENTROPY_IGNORE_IDX,
    return_average_logprobs: bool = False,
) -> Tensor:
    """Log-prob of each row's labels, summed or averaged over the scored tokens.

    Same as torchtune's::

        mask = labels[:, 1:] != label_pad_token_id
        ids = labels[:, 1:].masked_fill(~mask, 0)
        logps = logits[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
        (logps * mask).sum(-1)                                 # / (mask.sum(-1) + 1e-8)

    Args:
        logits: (B, T, V) float32, bfloat16, float16 or float64.
        labels: (B, T) ids.
        label_pad_token_id: the label that is not scored.
        return_average_logprobs: divide by the number of scored tokens.

    Returns:
        (B,) in the dtype of ``logits``, averages in float32 at least; the average of no token is 0.

    Raises:
        ValueError: shapes differ.  TensorError: another dtype; on the CPU an id outside [0, V).

    Numerics: float32 inside, rounded once. Rows that are not scored are not read: NaN there stays
    there, where theirs multiplies it by 0 and gives NaN.

    >>> get_batch_log_probs(torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]]))
    tensor([-2.7726])
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            "Logits (batch and sequence length dim) and labels must have the same shape."
        )
    grid, mask = shifted_logps(logits, labels, label_pad_token_id)
    sums = grid.sum(-1)
    if return_average_logprobs:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return like(sums / (mask.sum(-1) + _TINY), dtype)
    return like(sums, logits.dtype)


class DPOLoss(nn.Module):
    """DPO with label smoothing, of each pair.

    Same as torchtune's (``torchtune.rlhf.loss``)::

        h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        l = (1 - label_smoothing) * -logsigmoid(beta * h) + label_smoothing * -logsigmoid(-beta * h)
        l, beta * (policy_chosen - reference_chosen), ...

    arXiv:2305.18290, eq. 7; Mitchell's 2023 note, eq. 3.

    Args:
        beta, label_smoothing: the strength, and the share of pairs that are labelled wrong.

    ``forward`` takes ``policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
    reference_rejected_logps`` (N,) and gives losses and rewards (N,), the rewards without gradient.

    Numerics: the gradient in closed form; float32 inside for half precision.

    >>> from torch import tensor
    >>> DPOLoss()(tensor([-1.0]), tensor([-2.0]), tensor([-1.5]), tensor([-1.5]))
    (tensor([0.6444]), tensor([0.0500]), tensor([-0.0500]))
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sides = (policy_chosen_logps, policy_rejected_logps)
        reference = (reference_chosen_logps, reference_rejected_logps)
        losses = smoothed(sides, reference, beta=self.beta, label_smoothing=self.label_smoothing)
        return losses, *rewards(sides, reference, self.beta)
