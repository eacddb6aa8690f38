"""verl's log-probs (``verl.utils.torch_functional``), 0.4 and later."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from dpo_ext.compat.parts.rows import HALF, like, row_scores

__all__ = ["logprobs_from_logits"]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-prob of one token of each row of logits.

    Same as verl's::

        logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    verl takes flash-attn's cross entropy where that is installed and
    ``VERL_DISABLE_FLASH_ATTN_CE`` is not 1; then, on a GPU, ours does as that does: float32 values
    of half-precision logits, -100 is not scored (0), ``inplace_backward`` writes the gradient over
    the logits.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64.
        labels: (...) ids in [0, V).
        inplace_backward: see above; elsewhere, as in verl, it changes nothing.

    Returns:
        The shape of ``labels``, the dtype of ``logits``.

    Raises:
        TensorError: shape or dtype is not as above; on the CPU an id outside [0, V).

    Numerics: float32 inside for half precision, rounded once. Bits do not depend on the run, which
    verl's switch is for.

    >>> logprobs_from_logits(torch.zeros(1, 2, 4), torch.tensor([[1, 3]]))
    tensor([[-1.3863, -1.3863]])
    """
    flash = as_flash(logits)
    scored = labels != -100 if flash else None
    inplace = bool(inplace_backward) and flash and _may_overwrite(logits)
    out = row_scores(logits, labels, scored=scored, inplace_grad=inplace, name="labels")
    wide = flash and logits.dtype in HALF
    return out.logps if wide else like(out.logps, logits.dtype)


def as_flash(logits: Tensor) -> bool:
    """Whether verl would call flash-attn's kernel for these logits."""
    if logits.device.type != "cuda" or os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") == "1":
        return False
    return importlib.util.find_spec("flash_attn") is not None


def _may_overwrite(logits: Tensor) -> bool:
    """Not the memory of a leaf, which autograd would refuse, nor strided rows."""
    base = logits._base  # noqa: SLF001 - documented by torch, under this name
    leaf = logits.is_leaf or (base is not None and base.is_leaf)
    return torch.is_grad_enabled() and logits.requires_grad and logits.is_contiguous() and not leaf
