"""Log-probs of scored tokens and of sequences, from logits.

Letters: R rows of logits, V vocabulary, M tokens of the table, N groups (pairs), S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch.logps import cuda, ops, twin
from dpo_ext.torch.logps.scores import (
    Impl,
    TokenScores,
    Transform,
    check_is_table,
    check_stats,
    check_table,
    is_dtensor,
    only,
    sum_sequences,
    token_grad,
    uses_kernels,
)
from dpo_ext.torch.once import differentiable_once, node, one_by_one


def sequence_logps(
    logits: Tensor,
    table: ScoreTable,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_grad: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Log-prob of each sequence of the table: the weighted sum over its scored tokens.

    Same as::

        y = logit_scale * logits.flatten(0, -2)
        y = softcap * tanh(y / softcap) if softcap else y
        logps = log_softmax(y / temperature, -1)[table.logit_rows, table.targets]
        [sum(w * logp over its tokens) for each sequence].reshape(n_groups, group_size)

    but with no buffer of the logits' size, except one for their gradient, and rows that are not
    scored are never read. ``d logp / d z = (onehot - softmax(y)) * dy/dz`` (Rafailov et al. 2023,
    arXiv:2305.18290, sums of eq. 7).

    Args:
        logits: (R, V) or (B, T, V) with R = B * T; float32, bfloat16, float16, or float64 (the twin
            computes it). Any strides; a layout whose rows have no common stride is copied.
        table: which rows are scored, for which token of which sequence; on the logits' device.
        temperature: > 0, divides last.
        softcap: > 0 or None, the cap of the models that have one (Gemma 2: 30).
        logit_scale: > 0, multiplies first (Cohere's ``logit_scale``).
        inplace_grad: the backward pass writes the gradient over the logits. Saves their size in
            memory. Whoever else needs the logits' values in backward, or runs backward twice, gets
            autograd's error about a tensor modified in place. Hooks and ``retain_grad`` see memory
            that is shared with the logits.
        impl: ``"cuda"`` and ``"cpu"`` kernels, the readable ``"torch"`` twin, or ``"auto"``: the
            kernels of the logits' device, the twin for float64 and for devices without kernels.

    Returns:
        (n_groups, group_size), float32 (float64 for float64 logits), differentiable once.

    Raises:
        TensorError: shape, dtype or device is not as above; a row of a table on the CPU is not
            below R, or an id not below V; the table was changed into none; ``inplace_grad`` with
            logits that are a leaf, a view of one, or overlap in memory.
        KernelUnavailable: ``impl="cuda"`` (or ``"auto"`` on a GPU) without CuPy or a device.
        ValueError: ``impl``, or a scalar out of its range.

    Numerics: exponentials and their sums in float32 for every dtype but float64; token log-probs
    are within 4e-6 of float64 or half a unit in their last place, whichever is more (below -64
    nats it is the unit; the twin: a whole one). Sums over tokens in float64, in a fixed
    order. The same rows of logits give the same bits in any layout. On a GPU and in a compiled
    region, where no value is looked at, a target outside [0, V) or a row outside [0, R) gives NaN
    for its sequence. NaN and inf stay in their sequence. A token of weight 0 is not read. A
    sequence without tokens gives 0.

    >>> logits = torch.zeros(2, 3, 4)                      # chosen and rejected, T = 3, V = 4
    >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> sequence_logps(logits, ScoreTable.from_labels(labels))
    tensor([[-2.7726, -1.3863]])
    """
    how = Transform.of(logit_scale, softcap, temperature)
    check_is_table(table)
    scored = table.without_zero_weights()
    rows, kernels = _rows(logits, scored, impl, inplace_grad)
    call = _Call(how, False, inplace_grad, kernels)
    if kernels:
        (sums,) = _kernels(rows, scored, call, (table.weights, table.seq_offsets))
        return sums.reshape(-1, table.group_size)
    return sum_sequences(_score(rows, scored, call).logps, table, kernels)


def token_scores(
    logits: Tensor,
    table: ScoreTable,
    *,
    stats: Iterable[str] = (),
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_grad: bool = False,
    impl: Impl = "auto",
) -> TokenScores:
    """Log-prob of each token of the table and, on request, statistics of its row, in one read.

    Same as, with ``y`` as in `sequence_logps` and ``p = softmax(y)``::

        logps      = log_softmax(y, -1)[arange(M), targets]
        entropy    = -(p * log p).sum(-1)
        mean_logit = y.mean(-1)
        log_sum_sq = log((p * p).sum(-1))
        is_top1    = y.argmax(-1) == targets

    Args:
        stats: any of ``"entropy"``, ``"mean_logit"``, ``"log_sum_sq"``, ``"is_top1"``.
        logits, table: as in `sequence_logps`; the table's weights are not applied here.
        temperature, softcap, logit_scale, inplace_grad, impl: as in `sequence_logps`.

    Returns:
        TokenScores: ``logps`` (M,) differentiable, the asked-for statistics (M,), else None.

    Raises:
        As `sequence_logps`. ValueError: an unknown name in ``stats``.

    Numerics: as `sequence_logps`: ``logps`` within 4e-6 of float64 or half a unit in the last
    place, whichever is more: 4e-6 down to -64 nats, 3e-5 at -512. A logit of -inf makes
    ``mean_logit`` -inf and leaves the entropy finite (``0 log 0 = 0``).

    >>> table = ScoreTable.from_labels(torch.tensor([[-100, 1], [-100, 3]]))
    >>> scores = token_scores(torch.zeros(2, 2, 4), table, stats=("entropy", "is_top1"))
    >>> scores.entropy, scores.is_top1, scores.mean_logit
    (tensor([1.3863, 1.3863]), tensor([False, False]), None)
    """
    names = check_stats(stats)
    how = Transform.of(logit_scale, softcap, temperature)
    check_is_table(table)
    rows, kernels = _rows(logits, table, impl, inplace_grad)
    return only(_score(rows, table, _Call(how, bool(names), inplace_grad, kernels)), names)


def warm_up(
    dtype: torch.dtype,
    *,
    stats: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    device: torch.device | int | str = "cuda",
) -> None:
    """Compiles and loads the CUDA kernels that scoring logits of this kind launches.

    Otherwise the first call does, which takes seconds where CuPy has no compiled kernel in its
    cache, and cannot be captured: `torch.cuda.graph` allows no module to be loaded inside it. The
    kernels are those of given logits and of the linear heads, forward and backward.

    Args:
        dtype: of the logits: float32, bfloat16 or float16.
        stats: whether statistics are asked for (`token_scores`); kernels with and without them are
            two.
        temperature, softcap, logit_scale: as in the calls that follow; only whether there is a
            factor and a cap matters.
        device: a CUDA device; by default the current one.

    Raises:
        KernelUnavailable: without CuPy, a device or a compiler of kernels.
        TensorError: ``dtype`` has no kernels. ValueError: ``device`` is no CUDA device, or a scalar
            is out of its range.

    >>> if torch.cuda.is_available():
    ...     warm_up(torch.bfloat16, softcap=30.0)
    """
    how = Transform.of(logit_scale, softcap, temperature)
    if dtype not in ops.DTYPES:
        names = ", ".join(ops.DTYPES.values())
        raise TensorError(f"`dtype` must be one of {names}, found {describe(dtype)}")
    where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if where.type != "cuda":
        raise ValueError(f"`device` must be a CUDA device, found {where}")
    cuda.require()
    if where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    cuda.load(dtype, cuda.transform_arguments(*how)[0], stats, where)


class _Call(NamedTuple):
    """What one call computes, by what."""

    how: Transform
    stats: bool
    inplace: bool
    kernels: bool


def _rows(logits: Tensor, table: ScoreTable, impl: str, inplace_grad: bool) -> tuple[Tensor, bool]:
    """(R, V) logits that fit the table, and whether the kernels compute them."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"`logits` must be a torch.Tensor, found {describe(logits)}")
    if is_dtensor(logits):
        raise TensorError(
            "`logits` must be a plain tensor, found a DTensor\n"
            "hint: dpo_ext.torch.parallel scores one shard of the vocabulary, logits.to_local()"
        )
    kernels = uses_kernels(logits.dtype, logits.device.type, impl)
    if inplace_grad and not kernels:
        raise ValueError("`inplace_grad` needs the kernels, and here `impl` means the torch twin")
    if logits.dim() not in (2, 3):
        raise TensorError(
            f"`logits` must have shape (R, V) or (B, T, V), found {tuple(logits.shape)}"
        )
    check_table(table, logits, "logits", logits.shape[-1])
    return _flatten(logits, kernels, inplace_grad), kernels


def _score(rows: Tensor, table: ScoreTable, call: _Call) -> TokenScores:
    """All statistics or none of each token."""
    if not call.kernels:
        out = twin.token_stats(rows, table.logit_rows, table.targets, *call.how, call.stats)
        return TokenScores(*out)
    return TokenScores(*_kernels(rows, table, call, (None, None)))


def _kernels(
    rows: Tensor, table: ScoreTable, call: _Call, sums: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, ...]:
    """Log-probs of tokens, or of the sequences of ``sums``; all statistics or none."""
    out = node(_TokenStats, rows, table.logit_rows, table.targets, *sums, call)
    return out[: 5 if call.stats else 1]


def _flatten(logits: Tensor, kernels: bool, inplace_grad: bool) -> Tensor:
    """(R, V) view of (R, V) or (B, T, V) logits; a copy only where no view can be."""
    if inplace_grad and logits.requires_grad and _of_leaf(logits):
        what = "a leaf" if logits.is_leaf else "a view of a leaf"
        raise TensorError(
            f"`inplace_grad` would overwrite `logits`, {what} that needs a gradient\n"
            "hint: leave inplace_grad out, or pass the output of the model"
        )
    V = logits.shape[-1]
    if logits.dim() == 2:
        R, rows = logits.shape[0], logits
    else:
        R = logits.shape[0] * logits.shape[1]
        try:
            rows = logits.view(R, V)
        except RuntimeError:
            rows = logits if inplace_grad else logits.reshape(R, V)
    if not kernels:
        return rows
    steps_ok = V <= 1 or rows.stride(-1) == 1
    apart = R <= 1 or rows.stride(0) >= V
    if rows.dim() == 2 and steps_ok and apart:
        return rows
    if inplace_grad and logits.numel():
        raise TensorError(
            "`inplace_grad` needs logits that flatten to rows of one stride, with the vocabulary "
            f"contiguous, found strides {logits.stride()} for shape {tuple(logits.shape)}\n"
            "hint: leave inplace_grad out, or pass logits.contiguous()"
        )
    return rows.clone(memory_format=torch.contiguous_format)  # keeps the graph of empty logits too


def _of_leaf(logits: Tensor) -> bool:
    """Whether the memory is that of a leaf: autograd itself refuses to write over one in place."""
    base = logits._base  # noqa: SLF001 - documented by torch, under this name
    return logits.is_leaf or (base is not None and base.is_leaf)


class _TokenStats(torch.autograd.Function):
    """The kernels' statistics of each token; the log-probs are differentiable once. With
    ``seq_offsets`` their weighted sums over sequences stand in their place: one node, not two.
    """

    @staticmethod
    def forward(
        logits: Tensor,
        logit_rows: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        seq_offsets: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, ...]:
        logps, *state_and_stats = ops.token_stats(
            logits, logit_rows, targets, call.how, call.stats, (weights, seq_offsets)
        )
        state, stats = state_and_stats[:2], state_and_stats[2:]
        return (logps, *(stats if call.stats else ()), *state)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output[-2:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        return output[:-2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        logits, logit_rows, targets, weights, seq_offsets, *state = ctx.saved_tensors

        def gradients(g: Tensor) -> tuple[Tensor]:
            if seq_offsets is not None:
                g = token_grad(g, weights, seq_offsets, targets.shape[0])
            saved = (logit_rows, targets, *state, g.contiguous(), *ctx.call.how)
            if not ctx.call.inplace:
                return (ops.logits_grad(logits, *saved),)
            dz = logits.detach()
            ops.logits_grad_(dz, *saved)
            return (dz,)

        with torch.no_grad():
            (dz,) = one_by_one(gradients, grad)
        return (differentiable_once(dz, grad), *(None,) * 5)
