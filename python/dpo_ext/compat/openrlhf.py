"""OpenRLHF's log-probs and DPO loss (``openrlhf.models.utils`` and ``.loss``), 0.8 and later."""

from __future__ import annotations

from torch import Tensor, nn

from dpo_ext.compat.parts.margins import rewards, smoothed
from dpo_ext.compat.parts.rows import like, row_scores

__all__ = ["DPOLoss", "log_probs_from_logits"]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-prob of one token of each row of logits.

    Same as OpenRLHF's::

        logits.div_(temperature)                               # unless it is 1
        logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    Theirs changes the caller's logits, and its actor computes the entropy of what is left; so that
    this stays right, ours does too.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64; divided in place.
        labels: (...) ids in [0, V).
        temperature: divides, 1 by default.

    Returns:
        The shape of ``labels``, the dtype of ``logits``.

    Raises:
        TensorError: shape or dtype is not as above; on the CPU an id outside [0, V).
        RuntimeError: autograd's, as theirs, for a leaf that is divided in place.

    Numerics: float32 inside for half precision, rounded once.

    >>> import torch
    >>> log_probs_from_logits(torch.zeros(1, 2, 4), torch.tensor([[1, 3]]))
    tensor([[-1.3863, -1.3863]])
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return like(row_scores(logits, labels, name="labels").logps, logits.dtype)


class DPOLoss(nn.Module):
    """DPO, with label smoothing or as IPO, of the log-probs of pairs; the mean over the pairs.

    Same as OpenRLHF's::

        h = (policy_chosen - policy_rejected) - (reference_chosen - reference_rejected)
        l = (1 - label_smoothing) * -logsigmoid(beta * h) + label_smoothing * -logsigmoid(-beta * h)
        l = (h - 1 / (2 * beta)) ** 2                           # ipo, of sums: eq. 17
        l.mean(), beta * (policy_chosen - reference_chosen), ...

    arXiv:2305.18290, eq. 7; arXiv:2310.12036, eq. 17.

    Args:
        beta, label_smoothing: the strength, and the share of pairs that are labelled wrong.
        ipo: the squared loss, which ignores ``label_smoothing``.

    ``forward`` takes ``policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
    reference_rejected_logps`` (N,) and gives the mean loss and the rewards (N,), without gradient.

    Numerics: the gradient in closed form; float32 inside for half precision. No pairs: NaN.

    >>> from torch import tensor
    >>> DPOLoss(0.1)(tensor([-1.0]), tensor([-2.0]), tensor([-1.5]), tensor([-1.5]))
    (tensor(0.6444), tensor([0.0500]), tensor([-0.0500]))
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sides = (policy_chosen_logps, policy_rejected_logps)
        reference = (reference_chosen_logps, reference_rejected_logps)
        losses = smoothed(
            sides,
            reference,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            ipo=self.ipo,
        )
        return losses.mean(), *rewards(sides, reference, self.beta)
