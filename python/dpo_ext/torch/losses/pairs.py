"""Preference losses: from the log-probs of pairs to a scalar, its gradient and the metrics.

The table is `registry.LOSSES`; what other code bases mean by the same names is in `compat`. N
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.losses.checks import bind_parameters, convert_parameter
from dpo_ext.torch.losses.compat import Term, find_loss, resolve
from dpo_ext.torch.losses.forms import Number
from dpo_ext.torch.losses.inputs import Inputs
from dpo_ext.torch.losses.node import Bound, PairLoss, Pairs, weighted_sum
from dpo_ext.torch.losses.ranks import LOCAL, check_constants, check_parts
from dpo_ext.torch.losses.result import PreferenceLoss
from dpo_ext.torch.losses.row import LossRow, positive
from dpo_ext.torch.losses.signature import check_call
from dpo_ext.torch.numbers import as_number, host_values
from dpo_ext.torch.once import node

SCALE = positive()


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
    and flags: ``dpo-ext losses``, or docs/losses.

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
            the weights. A pair of weight 0 is not read: its NaN does not leak, its gradient is 0.
            A callable is shown log-probs of -1 in place of its NaN and infinities.
        num_pairs: > 0, replaces N in the mean; the pairs of the whole step, over all micro-batches
            and ranks: their losses then add up to the step's. Refused for losses that couple the
            batch, which no parts add up to.
        compat: ``"trl-1.16"``, ``"trl-0.28"``, ``"openrlhf"``, ``"llamafactory"`` or ``"paper"``:
            the name and its options mean what that code base computes.
        loss_weights: one factor for each loss of the list; 1 by default. A loss of factor 0 is not
            computed.
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
    if group is not None and num_pairs is not None:
        raise ValueError("`num_pairs` and `group` both say what the mean is over: pass one of them")
    if group is None and compat not in (None, "paper"):
        group = LOCAL
    inputs = Inputs(logps, ref_logps, lengths, weight, num_pairs, group)
    given = params if beta is None else {"beta": beta, **params}
    if loss_weights is None and compat is None and isinstance(loss, str):
        return _named_loss(loss, given, inputs)
    losses = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    factors = _factors(loss, losses, loss_weights)
    if compat is None:
        terms = _terms(losses, factors, given)
    else:
        terms, averages = resolve(compat, losses, factors, given)
        if averages and lengths is None:
            raise TensorError(f"`lengths` is missing: {compat} averages the log-probs of {loss!r}")
        inputs = inputs.averaged() if averages else inputs
    out = _sum_of_losses(terms, inputs)
    if beta is not None:  # the rewards take the beta that was given, or that of the first loss
        out.scale = convert_parameter("beta", beta, SCALE, logps)
    return out


def _factors(loss: Any, losses: Sequence[Any], loss_weights: Sequence[float] | None) -> list[float]:
    if loss_weights is not None and not isinstance(loss, (list, tuple)):
        raise ValueError("`loss_weights` needs a list of losses in `loss`")
    factors = [1.0] * len(losses)
    if loss_weights is not None:
        factors = [float(as_number("loss_weights", factor)) for factor in loss_weights]
    if not losses or len(factors) != len(losses):
        raise ValueError(
            f"`loss_weights` must have {len(losses)} factors, one a loss, found {len(factors)}"
        )
    return factors


def _terms(losses: Sequence[Any], factors: Sequence[float], given: Mapping[str, Any]) -> list[Term]:
    """Every loss with the parameters that it has; a callable takes all of them when it is alone."""
    if len(losses) == 1:
        return [Term(factors[0], losses[0], dict(given))]
    rows = [find_loss(name) if isinstance(name, str) else None for name in losses]
    known = {name for row in rows if row is not None for name in row.parameters}
    for name in given:
        if name not in known:
            raise ValueError(f"none of the losses {list(losses)!r} has a parameter `{name}`")
    return [
        Term(
            factor,
            name,
            {k: v for k, v in given.items() if row is not None and k in row.parameters},
        )
        for factor, name, row in zip(factors, losses, rows, strict=True)
    ]


def bind_terms(
    inputs: Inputs, loss: Any, loss_weights: Sequence[float] | None, given: Mapping[str, Any]
) -> tuple[tuple[float, Bound], ...]:
    """``(factor, row with its parameters)`` of losses that all stand in the table."""
    losses = list(loss) if isinstance(loss, (list, tuple)) else [loss]
    terms = _terms(losses, _factors(loss, losses, loss_weights), given)
    bound = []
    for factor, name, own in [term for term in terms if term.factor != 0] or terms:
        row = find_loss(name)  # type: ignore[arg-type]
        _check_needs(row, inputs)
        bound.append((factor, Bound(row, bind_parameters(row, own, inputs.logps))))
    return tuple(bound)


def _sum_of_losses(terms: Sequence[Term], inputs: Inputs) -> PreferenceLoss:
    """``sum_k factor_k * loss_k``; a loss of factor 0 is not computed, NaN or not."""
    terms = [term for term in terms if term.factor != 0] or terms
    parts = [
        (
            term.factor,
            _named_loss(term.loss, term.given, inputs)
            if isinstance(term.loss, str)
            else _function_loss(term.loss, term.given, inputs),
        )
        for term in terms
    ]
    if len(parts) == 1 and parts[0][0] == 1.0:
        total, per_pair = parts[0][1].loss, parts[0][1].per_pair
    else:
        total = torch.stack([factor * part.loss for factor, part in parts]).sum()
        per_pair = torch.stack([factor * part.per_pair for factor, part in parts]).sum(0)
    scales = [part.scale for _, part in parts if part.scale is not None]
    scale: Number | None = scales[0] if scales else None
    return PreferenceLoss(total, per_pair, inputs.logps, inputs.ref_logps, scale)


def _named_loss(name: str, given: Mapping[str, Any], inputs: Inputs) -> PreferenceLoss:
    """A loss of the table."""
    row = find_loss(name)
    if row.couples_batch:
        for option, is_given in (
            ("weight", inputs.weight is not None),
            ("num_pairs", inputs.counted),
        ):
            if is_given:
                raise ValueError(
                    f"loss {row.name!r} couples the batch: it does not take `{option}`\n"
                    "hint: pass all pairs of the step in one call, and `group` for several ranks"
                )
        check_parts(f"loss {row.name!r}", "couples the batch", inputs.ranks)
    _check_needs(row, inputs)
    bound = Bound(row, bind_parameters(row, given, inputs.logps))
    return _autograd_row_loss(bound, inputs) if row.autograd else _row_loss(bound, inputs)


def _check_needs(row: LossRow, inputs: Inputs) -> None:
    if row.reference and inputs.ref_logps is None:
        raise TensorError(
            f"`ref_logps` is missing: loss {row.name!r} needs the reference's log-probs"
        )
    if row.lengths and inputs.lengths is None:
        raise TensorError(
            f"`lengths` is missing: loss {row.name!r} needs the scored tokens of each sequence\n"
            "hint: pass `lengths=table.lengths`"
        )


def _row_loss(bound: Bound, inputs: Inputs) -> PreferenceLoss:
    """A row with a derivative in closed form."""
    row, params = bound
    whole = inputs.gathered() if row.couples_batch and inputs.group is not None else None
    tensors = [t for t in (params[name] for name in row.differentiable) if isinstance(t, Tensor)]
    pairs = Pairs(inputs.ref_logps, inputs.lengths, inputs.weight, inputs.count, whole)
    total, per_pair, *_ = node(PairLoss, inputs.logps, pairs, bound, *tensors)
    return _result(row.name, total, per_pair, params, inputs)


def _autograd_row_loss(bound: Bound, inputs: Inputs) -> PreferenceLoss:
    """A registered function of the log-probs, differentiated by autograd."""
    row, params = bound
    lengths = inputs.lengths if row.lengths else None
    if not row.couples_batch:
        logps, ref_logps = inputs.read()
        value = _call(row.formula, (logps, ref_logps, lengths), params)
        return _mean(row.name, value, params, inputs)
    logps, ref_logps, mine = inputs.logps, inputs.ref_logps, slice(None)
    if inputs.group is not None:
        check_constants(row.name, params)
        whole = inputs.gathered()
        ref_logps, lengths, mine = whole.ref_logps, whole.lengths, whole.mine
        lengths = lengths if row.lengths else None
        logps = torch.cat((whole.logps[: mine.start], logps, whole.logps[mine.stop :]))
    value = _call(row.formula, (logps, ref_logps, lengths), params)
    pairs = logps.shape[0]
    _check_returned(row.name, value, pairs)
    # the gradient is that of all pairs, the value this rank's part of theirs
    whole_mean, own = value.expand(pairs).sum() / inputs.count, value.detach().expand(pairs)[mine]
    total = whole_mean - (whole_mean.detach() - own.sum() / inputs.count)
    return _result(row.name, total, own, params, inputs)


def _function_loss(
    function: Callable[..., Any], params: Mapping[str, Any], inputs: Inputs
) -> PreferenceLoss:
    """A function of the log-probs that stands in no table, differentiated by autograd."""
    if not callable(function):
        raise TypeError(
            f"`loss` must be a name, a callable or a list of them, found {describe(function)}"
        )
    name = getattr(function, "__name__", repr(function))
    logps, ref_logps = inputs.read()
    value = _call(function, (logps, ref_logps, inputs.lengths), params)
    return _mean(name, value, params, inputs)


def _call(
    function: Callable[..., Any], tensors: tuple[Tensor | None, ...], params: Mapping[str, Any]
) -> Any:
    """The function of log-probs, reference and, unless they are None, lengths."""
    passed = tensors[:2] if tensors[2] is None else tensors
    if torch.compiler.is_compiling():
        return function(*passed, **params)
    try:
        return function(*passed, **params)
    except TypeError:
        check_call(function, ("logps", "ref_logps", "lengths")[: len(passed)], params)
        raise  # it can be called so: the error is from within


def _check_returned(name: str, value: Any, pairs: int) -> None:
    if not isinstance(value, Tensor) or value.shape not in ((), (pairs,)):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TensorError(f"loss {name!r} must return a scalar or ({pairs},), found {found}")


def _mean(name: str, value: Any, params: Mapping[str, Any], inputs: Inputs) -> PreferenceLoss:
    """The mean over pairs of what a function returned; a scalar is that mean already."""
    pairs = inputs.logps.shape[0]
    _check_returned(name, value, pairs)
    if value.dim() == 1:
        total = weighted_sum(value, inputs.weight) / inputs.count
        return _result(name, total, value, params, inputs)
    if inputs.weight is not None or inputs.counted or inputs.group is not None:
        raise ValueError(
            f"loss {name!r} returns a scalar: `weight`, `num_pairs` and `group` need a loss a pair"
        )
    per_pair, scale = value.detach().expand(pairs), params.get("beta")
    return PreferenceLoss(value, per_pair, inputs.logps, inputs.ref_logps, scale)


def _result(
    name: str, total: Tensor, per_pair: Tensor, params: Mapping[str, Any], inputs: Inputs
) -> PreferenceLoss:
    if host_values(total) and math.isnan(total.item()):
        inputs.explain_nan(name, params, per_pair)
    return PreferenceLoss(total, per_pair, inputs.logps, inputs.ref_logps, params.get("beta"))
