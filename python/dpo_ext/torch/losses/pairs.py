"""Preference losses: from the log-probs of pairs to a scalar, its gradient and the metrics.

The rows are in `loss_table`; how other code bases use the same names is in `loss_compat`. N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import dpo_ext.torch.losses.batch_rows  # noqa: F401 - fills LOSSES
from dpo_ext.errors import TensorError
from dpo_ext.torch.losses.checks import (
    bind_parameters,
    check_lengths,
    check_log_probs,
    check_num_pairs,
    check_reference,
    check_weight,
    convert_parameter,
    explain_nan,
    host_values,
)
from dpo_ext.torch.losses.compat import Term, find_loss, resolve
from dpo_ext.torch.losses.forms import Number
from dpo_ext.torch.losses.node import PairLoss
from dpo_ext.torch.losses.ranks import (
    LOCAL,
    check_constants,
    check_group,
    check_parts,
    count_pairs,
    gather_pairs,
)
from dpo_ext.torch.losses.result import PreferenceLoss
from dpo_ext.torch.losses.row import LossRow, positive

_SCALE = positive()


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: str | Callable[..., Tensor] | Sequence[str | Callable[..., Tensor]] = "dpo",
    beta: Any = None,
    lengths: Tensor | None = None,
    weight: Any = None,
    num_pairs: float | Tensor | None = None,
    compat: str | None = None,
    loss_weights: Sequence[float] | None = None,
    group: Any = None,
    **params: Any,
) -> PreferenceLoss:
    """Loss of preference pairs from the log-probs of their two sequences.

    Same as, for ``loss="dpo"``::

        h = (logps[:, 0] - ref_logps[:, 0]) - (logps[:, 1] - ref_logps[:, 1])
        loss = -logsigmoid(beta * h).mean()

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7. The other names, with paper, parameters, defaults
    and flags: ``dpo-ext losses``, or `loss_row.LOSSES`.

    Args:
        logps: (N, 2) float32 or float64, chosen then rejected; summed over the completion's tokens.
        ref_logps: (N, 2), same dtype; from the frozen reference, no gradient. None only for losses
            without one.
        loss: a name; a callable that is called with ``(logps, ref_logps)``, and with ``lengths``
            when they are given, and returns (N,) or a scalar; or a list of these, whose weighted
            sum is taken.
        beta: > 0, a float or (N,); strength of the pull to the reference. None is the row's
            default, 0.1 for DPO.
        lengths: (N, 2) scored tokens of each sequence, for losses of averages: ``table.lengths``.
        weight: >= 0, (N,); the batch loss is ``mean(weight * per_pair)``, not divided by the sum of
            the weights. A pair of weight 0 is not read: its NaN does not leak.
        num_pairs: > 0, replaces N in the mean; the pairs of the whole step, over all micro-batches
            and ranks: their losses then add up to the step's. Refused for losses that couple the
            batch, which no parts add up to.
        compat: ``"trl-1.16"``, ``"trl-0.28"``, ``"openrlhf"``, ``"llamafactory"`` or ``"paper"``:
            the name and its options mean what that code base computes.
        loss_weights: one factor for each loss of the list; 1 by default.
        group: process group whose ranks hold parts of one batch. The mean is over the pairs of all
            of them, a loss that couples the batch sees all of them, and the losses of the ranks add
            up to the batch's, as with ``num_pairs`` (DDP and FSDP2 average gradients over W ranks:
            multiply by W). Such a loss is refused where there are several ranks and no ``group``;
            ``"local"`` makes each rank's pairs a batch of their own, which is what every ``compat``
            but ``"paper"`` means.
        **params: parameters of the loss under the names of the table, floats or, where a pair has
            its own, (N,).

    Returns:
        PreferenceLoss: ``loss`` a scalar, ``per_pair`` (N,), rewards (N,) detached, ``metrics``
            with TRL's keys.

    Raises:
        TensorError: a tensor has the wrong shape, dtype, device or, on the CPU, content (NaN).
        ValueError: unknown or ambiguous loss, missing or unknown parameter, a parameter outside its
            domain; ``num_pairs``, ``weight`` or several ranks without ``group`` for a loss that
            couples the batch.

    Numerics: in the dtype of the input; gradients in closed form; finite while the loss is. At
    policy == reference the loss of ``"dpo"`` is log 2. Values of CUDA tensors are not checked,
    because looking at them waits for the device; gathering over a ``group`` waits once, for the
    number of pairs. A second derivative is refused.

    >>> from torch import tensor
    >>> preference_loss(tensor([[-1.0, -2.0]]), tensor([[-1.5, -1.5]])).loss
    tensor(0.6444)
    >>> logps, lengths = tensor([[-9.0, -8.0]]), tensor([[3, 4]])
    >>> preference_loss(logps, loss="simpo", lengths=lengths, gamma=0.5).loss
    tensor(2.5789)
    """
    check_log_probs(logps)
    if ref_logps is not None:
        check_reference(ref_logps, logps)
    if lengths is not None:
        check_lengths(lengths, logps)
    if group is not None and num_pairs is not None:
        raise ValueError("`num_pairs` and `group` both say what the mean is over: pass one of them")
    if loss_weights is None and compat is None and isinstance(loss, str):
        return _one_loss(loss, logps, ref_logps, lengths, beta, weight, num_pairs, group, params)
    losses = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    factors = _factors(loss, losses, loss_weights)
    given = params if beta is None else {"beta": beta, **params}
    averages = False
    if compat is None:
        terms = _terms(losses, factors, given)
    else:
        terms, averages = resolve(compat, losses, factors, given)
        group = LOCAL if group is None and compat != "paper" else group
    if averages:  # a mean over 0 tokens is 0
        if lengths is None:
            raise TensorError(f"`lengths` is missing: {compat} averages the log-probs of {loss!r}")
        divisor = lengths.to(logps.dtype).clamp(min=1)
        logps = logps / divisor
        ref_logps = None if ref_logps is None else ref_logps / divisor
        lengths = torch.ones_like(lengths)
    return _sum_of_losses(terms, logps, ref_logps, lengths, beta, weight, num_pairs, group)


def _factors(loss: Any, losses: Sequence[Any], loss_weights: Sequence[float] | None) -> list[float]:
    if loss_weights is not None and not isinstance(loss, (list, tuple)):
        raise ValueError("`loss_weights` needs a list of losses in `loss`")
    factors = [1.0] * len(losses) if loss_weights is None else [float(f) for f in loss_weights]
    if not losses or len(factors) != len(losses):
        raise ValueError(
            f"`loss_weights` must have {len(losses)} factors, one a loss, found {len(factors)}"
        )
    return factors


def _terms(losses: Sequence[Any], factors: Sequence[float], given: Mapping[str, Any]) -> list[Term]:
    """Every loss with the parameters that it has; a callable takes all of them when it is alone."""
    if len(losses) == 1:
        return [(factors[0], losses[0], dict(given))]
    rows = [find_loss(name) if isinstance(name, str) else None for name in losses]
    known = {name for row in rows if row is not None for name in row.parameters}
    for name in given:
        if name not in known:
            raise ValueError(f"none of the losses {list(losses)!r} has a parameter `{name}`")
    return [
        (factor, name, {k: v for k, v in given.items() if row is not None and k in row.parameters})
        for factor, name, row in zip(factors, losses, rows, strict=True)
    ]


def _one_loss(
    loss, logps, ref_logps, lengths, beta, weight, num_pairs, group, params
) -> PreferenceLoss:
    if isinstance(loss, str):
        row = find_loss(loss)
        if row.couples_batch:
            for name, value in (("weight", weight), ("num_pairs", num_pairs)):
                if value is not None:
                    raise ValueError(
                        f"loss {row.name!r} couples the batch: it does not take `{name}`\n"
                        "hint: pass all pairs of the step in one call, and `group` for several "
                        "ranks"
                    )
            check_parts(f"loss {row.name!r}", "couples the batch", group)
        if not row.autograd:
            return _row_loss(row, logps, ref_logps, lengths, beta, weight, num_pairs, group, params)
        _check_needs(row, ref_logps, lengths)
        bound = bind_parameters(row, beta, params, logps)
        passed = lengths if row.lengths else None
        return _autograd_loss(
            row.formula, row, logps, ref_logps, passed, bound, weight, num_pairs, group
        )
    if not callable(loss):
        raise TypeError(
            f"`loss` must be a name, a callable or a list of them, found {type(loss).__name__}"
        )
    bound = dict(params) if beta is None else {"beta": beta, **params}
    return _autograd_loss(loss, None, logps, ref_logps, lengths, bound, weight, num_pairs, group)


def _sum_of_losses(
    terms: Sequence[Term],
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    beta: Any,
    weight: Any,
    num_pairs: float | Tensor | None,
    group: Any,
) -> PreferenceLoss:
    """``sum_k factor_k * loss_k``; the rewards take the beta that was given, or the first
    loss's.
    """
    parts = [
        (factor, _one_loss(name, logps, ref_logps, lengths, None, weight, num_pairs, group, own))
        for factor, name, own in terms
    ]
    if len(parts) == 1 and parts[0][0] == 1.0:
        total, per_pair = parts[0][1].loss, parts[0][1].per_pair
    else:
        total = torch.stack([factor * part.loss for factor, part in parts]).sum()
        per_pair = torch.stack([factor * part.per_pair for factor, part in parts]).sum(0)
    scale: Number | None = next((p._scale for _, p in parts if p._scale is not None), None)
    if beta is not None:
        scale = convert_parameter("beta", beta, _SCALE, logps)
    return PreferenceLoss(total, per_pair, logps, ref_logps, scale)


def _row_loss(
    row: LossRow,
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    beta: Any,
    weight: Any,
    num_pairs: float | Tensor | None,
    group: Any,
    given: Mapping[str, Any],
) -> PreferenceLoss:
    _check_needs(row, ref_logps, lengths)
    params = bind_parameters(row, beta, given, logps)
    if weight is not None:
        weight = check_weight(weight, logps)
    count, ranks = _divisor(logps, num_pairs, group)
    gathered = None
    if ranks is not None and row.couples_batch:
        gathered = gather_pairs(logps, ref_logps, lengths, ranks)
    tensors = [t for t in (params[name] for name in row.differentiable) if isinstance(t, Tensor)]
    total, per_pair = PairLoss.apply(
        logps, ref_logps, lengths, row, params, weight, count, gathered, *tensors
    )
    if host_values(total) and math.isnan(total.item()):
        explain_nan(row.name, logps, ref_logps, params, per_pair)
    return PreferenceLoss(total, per_pair, logps, ref_logps, params.get("beta"))


def _divisor(
    logps: Tensor, num_pairs: float | Tensor | None, group: Any
) -> tuple[float | Tensor, Any]:
    """What the sum over this rank's pairs is divided by, and the group to gather over."""
    if num_pairs is not None:
        return check_num_pairs(num_pairs), None
    ranks = None if group is None else check_group(group)
    if ranks is None:
        return float(max(logps.shape[0], 1)), None
    return count_pairs(logps.shape[0], logps, ranks), ranks


def _check_needs(row: LossRow, ref_logps: Tensor | None, lengths: Tensor | None) -> None:
    if row.reference and ref_logps is None:
        raise TensorError(
            f"`ref_logps` is missing: loss {row.name!r} needs the reference's log-probs"
        )
    if row.lengths and lengths is None:
        raise TensorError(
            f"`lengths` is missing: loss {row.name!r} needs the scored tokens of each sequence\n"
            "hint: pass `lengths=table.lengths`"
        )


def _autograd_loss(
    function: Callable[..., Any],
    row: LossRow | None,
    logps: Tensor,
    ref_logps: Tensor | None,
    lengths: Tensor | None,
    params: Mapping[str, Any],
    weight: Any,
    num_pairs: float | Tensor | None,
    group: Any,
) -> PreferenceLoss:
    """A user's function of the log-probs, differentiated by autograd."""
    name = row.name if row is not None else getattr(function, "__name__", repr(function))
    count, ranks = _divisor(logps, num_pairs, group)
    coupled = row is not None and row.couples_batch
    seen, ref, mine = logps, ref_logps, slice(None)
    if coupled and ranks is not None:
        check_constants(name, params)
        whole = gather_pairs(logps, ref_logps, lengths, ranks)
        ref, lengths, mine = whole.ref_logps, whole.lengths, whole.mine
        seen = torch.cat((whole.logps[: mine.start], logps, whole.logps[mine.stop :]))
    if lengths is None:
        value = function(seen, ref, **params)
    else:
        value = function(seen, ref, lengths, **params)
    pairs = seen.shape[0]
    if not isinstance(value, Tensor) or value.shape not in ((), (pairs,)):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TensorError(f"loss {name!r} must return a scalar or ({pairs},), found {found}")
    scale = params.get("beta")
    if value.dim() == 0:
        if weight is not None or num_pairs is not None or (ranks is not None and not coupled):
            raise ValueError(
                f"loss {name!r} returns a scalar: `weight`, `num_pairs` and `group` need a loss a "
                "pair"
            )
        if not coupled:
            return PreferenceLoss(value, value.detach().expand(pairs), logps, ref_logps, scale)
        value = value.expand(pairs)
    if coupled:  # the gradient is that of all pairs, the value this rank's part of theirs
        whole_mean, value = value.sum() / count, value.detach()[mine]
        total = whole_mean - (whole_mean.detach() - value.sum() / count)
    else:
        total = _weighted_sum(value, weight, logps) / count
    if host_values(total) and math.isnan(total.item()):
        explain_nan(name, logps, ref_logps, params, value)
    return PreferenceLoss(total, value, logps, ref_logps, scale)


def _weighted_sum(value: Tensor, weight: Any, logps: Tensor) -> Tensor:
    if weight is None:
        return value.sum()
    weight = check_weight(weight, logps)
    return torch.where(weight == 0, torch.zeros_like(value), weight * value).sum()
