"""Log-probs of scored tokens and of sequences, from logits.

Letters: R rows of logits, V vocabulary, M tokens of the table, N groups (pairs), S sequences.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.errors import KernelUnavailable, TensorError
from dpo_ext.torch.logps import ops
from dpo_ext.torch.logps import twin
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable

IMPLS = ("auto", "cuda", "cpu", "torch")
STATS = ("entropy", "mean_logit", "log_sum_sq", "is_top1")


class TokenScores(NamedTuple):
    """Scores of the M tokens of a table; what was not asked for is None.

    Of a row ``y`` (after scale, cap and temperature) with ``p = softmax(y)`` and target t:

    - ``logps``: (M,) float32 or float64, ``log p_t``; differentiable.
    - ``entropy``: (M,), ``-sum p log p``, nats.
    - ``mean_logit``: (M,), ``mean(y)``.
    - ``log_sum_sq``: (M,), ``log sum p^2`` (the collision entropy negated; WPO's weight).
    - ``is_top1``: (M,) bool, whether the lowest index of ``max(y)`` is t.

    All but ``logps`` carry no gradient. Tokens that are not scored hold 0 and False.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq: Tensor | None = None
    is_top1: Tensor | None = None


class Transform(NamedTuple):
    """What is done to raw logits before the softmax; ``softcap`` 0 = none."""

    logit_scale: float
    softcap: float
    temperature: float

    @staticmethod
    def of(logit_scale: float, softcap: float | None, temperature: float) -> Transform:
        """Checked: each is finite and above 0; ``softcap=None`` is none."""
        named = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
        for name, value in named.items():
            if value is None and name == "softcap":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"`{name}` must be a number, found {type(value).__name__}")
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be finite and above 0, found {value}")
        return Transform(float(logit_scale), float(softcap or 0.0), float(temperature))


def sequence_logps(
    logits: Tensor,
    table: ScoreTable,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_grad: bool = False,
    impl: str = "auto",
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
            below R; ``inplace_grad`` with logits that are a leaf or overlap in memory.
        KernelUnavailable: ``impl="cuda"`` (or ``"auto"`` on a GPU) without CuPy or a device.
        ValueError: ``impl``, or a scalar out of its range.

    Numerics: exponentials and their sums in float32 for every dtype but float64; token log-probs
    are within 4e-6 of float64; sums over tokens in float64, in a fixed order. The same rows of
    logits give the same bits in any layout. A target outside [0, V) gives NaN for its sequence, as
    does (on a GPU) a row outside [0, R). NaN and inf stay in their sequence. A token of weight 0 is
    not read. A sequence without tokens gives 0.

    >>> logits = torch.zeros(2, 3, 4)                      # chosen and rejected, T = 3, V = 4
    >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> sequence_logps(logits, ScoreTable.from_labels(labels))
    tensor([[-2.7726, -1.3863]])
    """
    how = Transform.of(logit_scale, softcap, temperature)
    check_is_table(table)
    scored = table.without_zero_weights()
    scores, kernels = _token_scores(logits, scored, how, False, inplace_grad, impl)
    return sum_sequences(scores.logps, table, kernels)


def token_scores(
    logits: Tensor,
    table: ScoreTable,
    *,
    stats: Iterable[str] = (),
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    inplace_grad: bool = False,
    impl: str = "auto",
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

    Numerics: as `sequence_logps`. A logit of -inf makes ``mean_logit`` -inf and leaves the entropy
    finite (``0 log 0 = 0``).

    >>> table = ScoreTable.from_labels(torch.tensor([[-100, 1], [-100, 3]]))
    >>> scores = token_scores(torch.zeros(2, 2, 4), table, stats=("entropy", "is_top1"))
    >>> scores.entropy, scores.is_top1, scores.mean_logit
    (tensor([1.3863, 1.3863]), tensor([False, False]), None)
    """
    names = check_stats(stats)
    how = Transform.of(logit_scale, softcap, temperature)
    scores, _ = _token_scores(logits, table, how, bool(names), inplace_grad, impl)
    return only(scores, names)


def check_stats(stats: Iterable[str]) -> tuple[str, ...]:
    """The names of statistics, as a tuple; ValueError for one that does not exist."""
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    for name in names:
        if name not in STATS:
            raise ValueError(f"`stats` must be among {', '.join(STATS)}, found {name!r}")
    return names


def only(scores: TokenScores, names: tuple[str, ...]) -> TokenScores:
    """Log-probs and the statistics that were asked for; the kernels compute all or none."""
    return TokenScores(scores.logps, *(getattr(scores, s) if s in names else None for s in STATS))


def sum_sequences(logps: Tensor, table: ScoreTable, kernels: bool) -> Tensor:
    """(n_groups, group_size) weighted sums of token log-probs (M,), added in float64."""
    add: Callable[..., Any] = _SegmentSum.apply if kernels else twin.segment_sum
    return add(logps, table.weights, table.seq_offsets).reshape(-1, table.group_size)


def uses_kernels(values: Tensor, impl: str, name: str = "logits") -> bool:
    """Whether ``impl`` means the kernels (or the twin) for this tensor; raises if it cannot."""
    if impl not in IMPLS:
        raise ValueError(f"`impl` must be one of {', '.join(IMPLS)}, found {impl!r}")
    if not values.is_floating_point():
        found = str(values.dtype).removeprefix("torch.")
        raise TensorError(f"`{name}` must have a floating-point dtype, found {found}")
    where = values.device.type
    if values.dtype not in ops.DTYPES and values.dtype != torch.float64:
        found = str(values.dtype).removeprefix("torch.")
        accepted = ", ".join((*ops.DTYPES.values(), "float64"))
        raise TensorError(f"`{name}` must be {accepted}, found {found}")
    if impl == "torch":
        return False
    if impl == "auto":
        return where in ("cpu", "cuda") and values.dtype in ops.DTYPES
    if impl == "cuda" and not torch.cuda.is_available():
        raise KernelUnavailable(
            'no CUDA device: `impl="cuda"` needs one\n'
            'hint: use impl="torch", or impl="auto" to choose by device'
        )
    if impl != where:
        raise TensorError(
            f'`{name}` must be on a {impl} device for impl="{impl}", found {where}\n'
            'hint: use impl="auto" to choose by device'
        )
    if values.dtype not in ops.DTYPES:
        found = str(values.dtype).removeprefix("torch.")
        accepted = ", ".join(ops.DTYPES.values())
        raise TensorError(
            f'`{name}` must be {accepted} for impl="{impl}", found {found}\nhint: use impl="torch"'
        )
    return True


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, without importing torch.distributed for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_plain(name: str, value: Any) -> None:
    """A tensor that is whole on this rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch tensor, found {type(value).__name__}")
    if is_dtensor(value):
        raise TensorError(
            f"`{name}` must be a plain tensor, found a DTensor\nhint: use `{name}.full_tensor()`"
        )


def check_is_table(table: ScoreTable) -> None:
    """TypeError for anything else, labels for example."""
    if not isinstance(table, ScoreTable):
        raise TypeError(f"`table` must be a ScoreTable, found {type(table).__name__}")


def check_table(table: ScoreTable, values: Tensor, name: str) -> None:
    """Table and (R, ...) values fit: same device and, if that is the CPU, rows below R."""
    check_is_table(table)
    if table.device != values.device:
        raise TensorError(
            f"`table` must be on {values.device}, as `{name}` is, found {table.device}\n"
            f"hint: use table.to({name}.device)"
        )
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    R = values.shape[0]
    beyond = (table.logit_rows >= R) & (table.targets != IGNORE_INDEX)
    if bool(beyond.any()):
        i = int(beyond.nonzero()[0])
        raise TensorError(
            f"`logit_rows` must be below {R}, the rows of `{name}`, "
            f"found {int(table.logit_rows[i])} at token {i}"
        )


def _token_scores(
    logits: Tensor,
    table: ScoreTable,
    how: Transform,
    stats: bool,
    inplace_grad: bool,
    impl: str,
) -> tuple[TokenScores, bool]:
    """All statistics or none of each token, and whether the kernels computed them."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"`logits` must be a torch.Tensor, found {type(logits).__name__}")
    if is_dtensor(logits):
        raise TensorError(
            "`logits` must be a plain tensor, found a DTensor\n"
            "hint: dpo_ext.torch.parallel scores one shard of the vocabulary, logits.to_local()"
        )
    kernels = uses_kernels(logits, impl)
    if inplace_grad and not kernels:
        raise ValueError("`inplace_grad` needs the kernels, and here `impl` means the torch twin")
    rows = _flatten(logits, kernels, inplace_grad)
    check_table(table, rows, "logits")
    if not kernels:
        out = twin.token_stats(rows, table.logit_rows, table.targets, *how, stats)
        return TokenScores(*out), False
    out = _TokenStats.apply(rows, table.logit_rows, table.targets, how, stats, inplace_grad)
    return TokenScores(out[0], *out[3:]), True


def _flatten(logits: Tensor, kernels: bool, inplace_grad: bool) -> Tensor:
    """(R, V) view of (R, V) or (B, T, V) logits; a copy only where no view can be."""
    if logits.dim() not in (2, 3):
        raise TensorError(
            f"`logits` must have shape (R, V) or (B, T, V), found {tuple(logits.shape)}"
        )
    if inplace_grad and logits.requires_grad and logits.is_leaf:
        raise TensorError(
            "`inplace_grad` would overwrite `logits`, a leaf that needs a gradient\n"
            "hint: leave inplace_grad out, or pass the output of the model"
        )
    R, V = logits.shape[:-1].numel(), logits.shape[-1]
    if logits.dim() == 2:
        rows = logits
    else:
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


class _TokenStats(torch.autograd.Function):
    """The kernels' statistics of each token; the log-probs are differentiable once."""

    @staticmethod
    def forward(
        logits: Tensor,
        logit_rows: Tensor,
        targets: Tensor,
        how: Transform,
        stats: bool,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        return torch.ops.dpo_ext.token_stats(logits, logit_rows, targets, *how, stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, logit_rows, targets, ctx.how, _, ctx.inplace = inputs
        ctx.save_for_backward(logits, logit_rows, targets, output[1], output[2])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        logits, *saved = ctx.saved_tensors
        with torch.no_grad():
            if not ctx.inplace:
                dz = torch.ops.dpo_ext.logits_grad(logits, *saved, grad.contiguous(), *ctx.how)
            else:
                dz = logits.detach()
                torch.ops.dpo_ext.logits_grad_(dz, *saved, grad.contiguous(), *ctx.how)
        return (differentiable_once(dz, grad), None, None, None, None, None)


def differentiable_once(value: Tensor, upstream: Tensor) -> Tensor:
    """A gradient whose own gradient, if ever asked for, is an error instead of silently missing."""
    if not torch.is_grad_enabled():  # autograd wants no graph of this backward pass
        return value
    anchor = torch.zeros((), requires_grad=True)
    return _DifferentiableOnce.apply(value, upstream, anchor)


class _DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *parents: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "the log-probs of the kernels can be differentiated once, not twice\n"
            'hint: impl="torch" has a second derivative per token (token_scores)'
        )


class _SegmentSum(torch.autograd.Function):
    """The kernels' weighted sums over sequences."""

    @staticmethod
    def forward(values: Tensor, weights: Tensor | None, seq_offsets: Tensor) -> Tensor:
        return torch.ops.dpo_ext.segment_sum(values, weights, seq_offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, weights, seq_offsets = inputs
        ctx.tokens = values.shape[0]
        ctx.save_for_backward(weights, seq_offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, seq_offsets = ctx.saved_tensors
        return (token_grad(grad, weights, seq_offsets, ctx.tokens), None, None)


def token_grad(grad: Tensor, weights: Tensor | None, seq_offsets: Tensor, tokens: int) -> Tensor:
    """(M,) gradients of the tokens' log-probs from those of sequences (S,): ``w * grad[seq]``."""
    place = torch.arange(tokens, dtype=torch.int32, device=grad.device)
    g = grad[torch.bucketize(place, seq_offsets[1:], right=True)]
    return g if weights is None else torch.where(weights != 0, g * weights, 0.0)
