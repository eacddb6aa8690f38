"""TRL's log-probs, entropies and fused head; signatures and return values of TRL 0.18 to 1.16.

R rows, V vocabulary, H hidden. ``dpo_ext.compat.patch("trl")`` puts them in the place of TRL's.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from dpo_ext.compat.parts.entropy import attach_entropy, attach_linear_entropy
from dpo_ext.compat.parts.rows import as_targets, check_ids, like, logit_rows, row_scores, table_of
from dpo_ext.compat.parts.several import several_logps
from dpo_ext.errors import TensorError
from dpo_ext.torch.logps.linear import linear_token_scores
from dpo_ext.torch.logps.logits import token_scores
from dpo_ext.torch.logps.scores import Transform, check_plain

__all__ = [
    "ChunkedLogProbFunction",
    "ChunkedLogProbFunction1_5",
    "ChunkedLogProbFunction1_13",
    "entropy_from_logits",
    "online_dpo_forward",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_IMAGES = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
_OURS = ("entropy", "log_sum_sq", "mean_logit", "is_top1")


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"`temperature` must be above 0, found {temperature!r}")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-prob of one token, or of K tokens, of each row of logits.

    Same as TRL's (``trl.trainer.utils``; the last two arguments are of 1.15 and later)::

        logps = torch.log_softmax(logits / temperature, -1)
        logps = logps.gather(-1, index[..., None])[..., 0]     # index (..., K): gather(-1, index)
        logps = logps.masked_fill(row_mask == 0, 0.0)

    in one read of the logits, whose gradient is the only buffer of their size.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64; any strides.
        index: (...) or (..., K) integers in [0, V).
        temperature: > 0.
        row_mask: shape of ``index``; a row of 0 gives 0, has no gradient and is not read.

    Returns:
        The shape of ``index``, the dtype of ``logits``.

    Raises:
        TensorError: shape or dtype is not as above; on the CPU an id outside [0, V).  ValueError:
            ``temperature``.

    Numerics: float32 inside for half precision and rounded once, where TRL rounds the logits that
    it divided by the temperature and in versions before 1.15 every log-prob: at most its error. On
    a GPU an id outside [0, V) gives NaN and no device assertion. -100 is no id here, as in TRL.

    >>> selective_log_softmax(torch.zeros(1, 2, 4), torch.tensor([[1, 3]]))
    tensor([[-1.3863, -1.3863]])
    """
    _check_temperature(temperature)
    check_plain("logits", logits)
    check_plain("index", index)
    scored = None if row_mask is None else row_mask != 0
    if index.dim() == logits.dim() and logits.dim():
        logps = several_logps(logits, index, Transform(1.0, 0.0, float(temperature)))
        if scored is not None:
            logps = logps.masked_fill(~scored, 0.0)
    else:
        logps = row_scores(logits, index, scored=scored, temperature=temperature).logps
    return like(logps, logits.dtype)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Shannon entropy of each row of logits, in nats, with its gradient.

    Same as TRL's (``trl.trainer.utils``, 0.20 and later)::

        logps = torch.log_softmax(logits, -1)
        -(logps.exp() * logps).sum(-1)

    ``dE/dz_j = -p_j (log p_j + E)``.

    Args:
        logits: (..., V), as in `selective_log_softmax`.
        chunk_size: TRL's rows at a time; nothing here depends on it. (Its default was 1 to 0.22.)

    Returns:
        ``logits.shape[:-1]``, the dtype of ``logits``.

    Raises:
        TensorError: a dtype that is not floating-point.

    Numerics: float32 inside, rounded once; TRL adds bfloat16 products in bfloat16, off by some
    percent. A logit of -inf has no part in the entropy (``0 log 0 = 0``); TRL's is NaN there.

    >>> entropy_from_logits(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """
    check_plain("logits", logits)
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int32, device=logits.device)
    return like(_entropy(logits, ids, 1.0, None)[1], logits.dtype)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` and the entropy of each row, from one read of the logits.

    Same as TRL's (``trl.trainer.utils``, 1.15 and later)::

        logits = logits / temperature
        selective_log_softmax(logits, index, row_mask=row_mask), entropy_from_logits(logits)

    Args:
        logits, index, temperature, row_mask: as in `selective_log_softmax`, ``index`` (...) alone.
        entropy_requires_grad: False gives an entropy without gradient.

    Returns:
        Log-probs and entropies of the shape of ``index``, in the dtype of ``logits``.

    Raises:
        As `selective_log_softmax`.

    Numerics: as `selective_log_softmax` and `entropy_from_logits`.

    >>> selective_log_softmax_and_entropy(torch.zeros(1, 4), torch.tensor([2]))
    (tensor([-1.3863]), tensor([1.3863]))
    """
    _check_temperature(temperature)
    scored = None if row_mask is None else row_mask != 0
    logps, entropy = _entropy(logits, index, float(temperature), scored)
    if not entropy_requires_grad:
        entropy = entropy.detach()
    return like(logps, logits.dtype), like(entropy, logits.dtype)


def _entropy(
    logits: Tensor, ids: Tensor, temperature: float, scored: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_ids(logits, ids, "index")
    rows, places = logit_rows(logits)
    table = table_of(places, as_targets(ids, scored, "index"))
    out = token_scores(rows, table, stats=("entropy",), temperature=temperature)
    entropy = out.entropy
    assert entropy is not None
    if torch.is_grad_enabled() and rows.requires_grad:
        entropy = attach_entropy(rows, places, entropy, Transform(1.0, 0.0, temperature))
        if scored is not None:
            entropy = entropy.masked_fill(~scored.reshape(-1), 0.0)
    return out.logps.reshape(ids.shape), entropy.reshape(ids.shape)


class ChunkedLogProbFunction:
    """TRL's fused head of 1.15 and later: ``apply`` takes and gives what its ``Function`` does.

    In ``trl.kernels`` and, as ``_ChunkedLogProbFunction``, in ``trl.trainer.utils``, where
    `add_fused_lm_head` calls it for DPO, KTO, GRPO, RLOO and SFT.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        """Log-prob and statistics of each row from hidden states, the head inside.

        Same as::

            y = logit_scale * (hidden @ weight.T + bias)
            y = cap * tanh(y / cap) if cap else y                  # final_logit_softcapping
            p = softmax(y / temperature, -1)
            (log p[targets], -(p * log p).sum(-1), log((p * p).sum(-1)),
             (y / temperature).mean(-1), p.argmax(-1) == targets)

        Args:
            hidden: (R, H) float32, bfloat16, float16 or float64.
            weight, bias: (V, H), (V,) or None; another dtype than ``hidden`` is cast to it.
            targets: (R,) ids in [0, V).
            temperature, final_logit_softcapping, logit_scale: > 0, or None for no cap.
            chunk_size: TRL's columns at a time; ours go by rows, 1.1 GB of logits at most.
            outputs: which of the last four are asked for; the others are None.

        Returns:
            ``(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1)``, (R,) each, float32 and
            bool. The first two carry a gradient to ``hidden``, ``weight`` and ``bias``.

        Raises:
            TensorError, ValueError: as `dpo_ext.torch.linear_token_scores`.

        Numerics: logits are rounded to the dtype of the product, all else is float32.

        >>> x, w = torch.zeros(1, 8), torch.zeros(4, 8)
        >>> call = ChunkedLogProbFunction.apply
        >>> call(x, w, None, torch.tensor([0]), 1.0, 2, None, 1.0, ("entropy",))
        (tensor([-1.3863]), tensor([1.3863]), None, None, None)
        """
        head = (hidden, weight, bias)
        wanted = [
            ours for ours, name in zip(_OURS, OPTIONAL_OUTPUTS, strict=True) if name in outputs
        ]
        how = (temperature, final_logit_softcapping, logit_scale)
        return _head(head, targets, how, tuple(wanted), trained_entropy=True)


class ChunkedLogProbFunction1_13:  # noqa: N801 - TRL's name, and the version that it is of
    """TRL's ``_ChunkedLogProbFunction`` of 1.13 and 1.14: log-probs and entropy, with a bias."""

    @staticmethod
    def apply(
        last_hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor | None, ...]:
        """The first two values of `ChunkedLogProbFunction.apply`, both with a gradient.

        >>> x, w = torch.zeros(1, 8), torch.zeros(4, 8)
        >>> ChunkedLogProbFunction1_13.apply(x, w, None, torch.tensor([0]), 1.0, 2)
        (tensor([-1.3863]), tensor([1.3863]))
        """
        how = (temperature, final_logit_softcapping, logit_scale)
        head = (last_hidden, weight, bias)
        return _head(head, targets, how, ("entropy",), trained_entropy=True)[:2]


class ChunkedLogProbFunction1_5:  # noqa: N801
    """TRL's ``_ChunkedLogProbFunction`` of 1.5 to 1.12: without bias."""

    @staticmethod
    def apply(
        last_hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor | None, ...]:
        """The first two values of `ChunkedLogProbFunction.apply`.

        Theirs is wrong in one thing, which is kept: the entropy looks as if it had a gradient, and
        backward leaves it out (a loss of the entropy alone has gradients of 0).

        >>> x, w = torch.zeros(1, 8), torch.zeros(4, 8)
        >>> ChunkedLogProbFunction1_5.apply(x, w, torch.tensor([0]), 1.0, 2)
        (tensor([-1.3863]), tensor([1.3863]))
        """
        how = (temperature, final_logit_softcapping, logit_scale)
        head = (last_hidden, weight, None)
        logps, entropy, *_ = _head(head, targets, how, ("entropy",), trained_entropy=False)
        assert logps is not None
        assert entropy is not None
        if logps.requires_grad:  # connected, and worth nothing
            entropy = torch.where(torch.ones_like(logps, dtype=torch.bool), entropy, logps)
        return logps, entropy


def _head(
    head: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    how: tuple[float, float | None, float],
    stats: tuple[str, ...],
    *,
    trained_entropy: bool,
) -> tuple[Tensor | None, ...]:
    """Five values of each row; the entropy with a gradient only where that is asked for."""
    hidden, weight, bias = head
    temperature, softcap, logit_scale = how
    for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        check_plain(name, value)
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise TensorError(
            "`targets` must be (R,) beside `hidden` (R, H), found "
            f"{tuple(targets.shape)} and {tuple(hidden.shape)}"
        )
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = like(weight, hidden.dtype)
        bias = None if bias is None else like(bias, hidden.dtype)
    table = table_of(
        torch.arange(len(targets), device=targets.device), as_targets(targets, None, "targets")
    )
    out = linear_token_scores(
        hidden,
        weight,
        table,
        stats=stats,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    entropy = out.entropy
    if entropy is not None and trained_entropy and out.logps.requires_grad:
        transform = Transform.of(logit_scale, softcap, temperature)
        entropy = attach_linear_entropy(hidden, weight, bias, entropy, transform)
    values = (out.logps, entropy, out.log_sum_sq, out.mean_logit)
    floats = (None if x is None else like(x, torch.float32) for x in values)
    return (*floats, out.is_top1)


def online_dpo_forward(
    self: Any,
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    vision_inputs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Log-probs of completions under a model: ``OnlineDPOTrainer._forward``, of which Nash-MD and
    XPO are heirs.

    Same as TRL's, whose last line is ``take_along_dim(logits.log_softmax(-1), ids[..., None], 2)``.
    The prompt loses tokens on the left until both fit ``self.max_length``; with pictures not from
    TRL 1.16 on (before, it lost their tokens too: theirs, and kept).

    Args:
        self: the trainer, of which ``max_length`` is read.
        model: called as ``model(ids, attention_mask=..., **pictures).logits``.
        prompt_ids, prompt_mask: (B, P) integers.
        completion_ids, completion_mask: (B, C) integers.
        vision_inputs: pictures, of which four names are handed on. (TRL 0.23 and later.)

    Returns:
        (B, C) in the dtype of the logits, padding scored too.

    Raises:
        As `selective_log_softmax`.

    >>> from types import SimpleNamespace as Bag
    >>> model = lambda ids, attention_mask: Bag(logits=torch.zeros(*ids.shape, 4))
    >>> ids = torch.tensor([[1, 2]])
    >>> online_dpo_forward(Bag(max_length=8), model, ids, ids > 0, ids, ids > 0)
    tensor([[-1.3863, -1.3863]])
    """
    if vision_inputs is None or not _since_1_16():
        cut = max(prompt_ids.shape[1] + completion_ids.shape[1] - self.max_length, 0)
        prompt_ids, prompt_mask = prompt_ids[:, cut:], prompt_mask[:, cut:]
    ids = torch.cat((prompt_ids, completion_ids), 1)
    mask = torch.cat((prompt_mask, completion_mask), 1)
    given = vision_inputs or {}
    pictures = {name: given[name] for name in _IMAGES if name in given}
    logits = model(ids, attention_mask=mask, **pictures).logits
    P = prompt_ids.shape[1]
    return selective_log_softmax(logits[:, P - 1 : -1] if P else logits, completion_ids)


def _since_1_16() -> bool:
    version = str(getattr(sys.modules.get("trl"), "__version__", "1.16"))
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    return tuple(numbers) >= (1, 16)
