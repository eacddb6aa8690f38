"""What every way to log-probs shares: result, options, checks, and the sums of sequences."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpo_ext.errors import KernelUnavailable, TensorError, describe
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable, Shape
from dpo_ext.torch.logps import ops, twin
from dpo_ext.torch.numbers import as_number
from dpo_ext.torch.once import node

Impl = Literal["auto", "cuda", "cpu", "torch"]
IMPLS: tuple[Impl, ...] = get_args(Impl)
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
        return Transform(
            _above_0("logit_scale", logit_scale),
            0.0 if softcap is None else _above_0("softcap", softcap),
            _above_0("temperature", temperature),
        )


def _above_0(name: str, value: Any) -> float:
    number = as_number(name, value)
    # Not `int | float`, which the compiler of torch 2.8 cannot trace.
    if not isinstance(number, (int, float)):
        raise TypeError(f"`{name}` must be a number, found {type(value).__name__}")
    if not 0 < number < math.inf:
        raise ValueError(f"`{name}` must be finite and above 0, found {value}")
    return float(number)


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
    add: Callable[..., Any] = functools.partial(node, _SegmentSum) if kernels else twin.segment_sum
    return add(logps, table.weights, table.seq_offsets).reshape(-1, table.group_size)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off; where it is off already, nothing, which takes less time."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def uses_kernels(dtype: torch.dtype, where: str, impl: str, name: str = "logits") -> bool:
    """Whether ``impl`` means the kernels (or the twin) for a tensor of this dtype and type of
    device; raises if it cannot.
    """
    if impl not in IMPLS:
        raise ValueError(f"`impl` must be one of {', '.join(IMPLS)}, found {impl!r}")
    if not dtype.is_floating_point:
        raise TensorError(f"`{name}` must have a floating-point dtype, found {describe(dtype)}")
    if dtype not in ops.DTYPES and dtype != torch.float64:
        accepted = ", ".join((*ops.DTYPES.values(), "float64"))
        raise TensorError(f"`{name}` must be {accepted}, found {describe(dtype)}")
    if impl == "torch":
        return False
    if impl == "auto":
        return where in ("cpu", "cuda") and dtype in ops.DTYPES
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
    if dtype not in ops.DTYPES:
        raise TensorError(
            f'`{name}` must be {", ".join(ops.DTYPES.values())} for impl="{impl}", found '
            f'{describe(dtype)}\nhint: use impl="torch"'
        )
    return True


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, told by a method that no other tensor has: no import of
    torch.distributed, and no look at the modules that are loaded, which a compiled region would
    read once and for all.
    """
    if type(value) is Tensor:  # most are, and to find that there is no such method takes longer
        return False
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def check_plain(name: str, value: Any) -> None:
    """A tensor that is whole on this rank."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a torch tensor, found {type(value).__name__}")
    if is_dtensor(value):
        raise TensorError(
            f"`{name}` must be a plain tensor, found a DTensor\nhint: use `{name}.full_tensor()`"
        )


def check_is_table(table: ScoreTable) -> None:
    """TypeError for anything else, labels for example; TensorError for a table that was changed
    into none.
    """
    if not isinstance(table, ScoreTable):
        raise TypeError(f"`table` must be a ScoreTable, found {type(table).__name__}")
    table.compare_again()


def check_table(
    table: ScoreTable, values: Tensor, name: str, vocabulary: int | None = None
) -> None:
    """A table (`check_is_table`) and values (R, ...) or (rows, T, ...) fit: same device, the
    table's own shape and, on the CPU, its rows below R and its ids below ``vocabulary``. Waits for
    no device.
    """
    targets, device = table.targets, values.device
    if targets.device != device:
        raise TensorError(
            f"`table` must be on {device}, as `{name}` is, found {table.device}\n"
            f"hint: use table.to({name}.device)"
        )
    check_shape(table.shape, values, name)
    if device.type != "cpu" or torch.compiler.is_compiling() or not targets.shape[0]:
        return
    R = values.shape[0] if values.dim() == 2 else values.shape[0] * values.shape[1]
    # Two reductions say of nearly every table that it fits; tokens that are not scored may not.
    if int(table.logit_rows.max()) >= R:
        beyond = (table.logit_rows >= R) & (targets != IGNORE_INDEX)
        if bool(beyond.any()):
            i = int(beyond.nonzero()[0])
            raise TensorError(
                f"`logit_rows` must be below {R}, the rows of `{name}`, "
                f"found {int(table.logit_rows[i])} at token {i}"
            )
    if vocabulary is not None and int(targets.max()) >= vocabulary:
        i = int((targets >= vocabulary).nonzero()[0])
        raise TensorError(
            f"`targets` must be below {vocabulary}, the vocabulary of `{name}`, found "
            f"{int(targets[i])} at token {i}, {_place(table, i)}\n"
            "hint: the labels are of another tokenizer than the model, or its embedding was not "
            "resized to it"
        )


def _place(table: ScoreTable, token: int) -> str:
    row = int(table.logit_rows[token])
    if table.shape is None or len(table.shape) != 2:
        return f"row {row}"
    return f"row {row} (row {row // table.shape[1]}, column {row % table.shape[1]})"


def check_shape(shape: Shape | None, values: Tensor, name: str) -> None:
    """Values (rows, T, ...) or (rows * T, ...) are of the (rows, T) of a table, if it knows it.

    Sizes alone are compared, which the host has.
    """
    if shape is None:
        return
    if len(shape) == 1:
        (wanted,) = shape
        found = values.shape[0] if values.dim() == 2 else values.shape[0] * values.shape[1]
        if found != wanted:
            raise TensorError(
                f"`{name}` must have {wanted} rows, as the table has, found {found} in "
                f"{tuple(values.shape)}"
            )
        return
    rows, T = shape
    if values.dim() == 2:
        if values.shape[0] != rows * T:
            raise TensorError(_another_shape(rows, T, values, name))
    elif values.shape[0] != rows or values.shape[1] != T:
        raise TensorError(_another_shape(rows, T, values, name))


def _another_shape(rows: int, T: int, values: Tensor, name: str) -> str:
    """What is expected, found, and what the difference looks like."""
    last = "V" if name.endswith("logits") else "H"
    if values.dim() == 2:
        expected, R = f"({rows * T}, {last}), {rows} x {T} rows as the table has", values.shape[0]
        columns = R // rows if rows and R % rows == 0 else None
        here = f"{name}.reshape({rows}, {columns}, -1)"
    else:
        expected = f"({rows}, {T}, {last}), as the table's labels or batch have"
        columns = values.shape[1] if values.shape[0] == rows else None
        here = name
    what = f"`{name}` must have shape {expected}, found {tuple(values.shape)}"
    if columns is None:
        return (
            f"{what}\nhint: build the table from the labels or the batch that the model was given"
        )
    if columns > T:
        k = columns - T
        return (
            f"{what}: {k} columns more\nhint: virtual tokens or image patches stand before the "
            f"text; cut them off: {here}[:, {k}:]"
        )
    k = T - columns
    return (
        f"{what}: {k} columns fewer\nhint: give the model's logits whole, without `logits_to_keep` "
        "and not shifted; or cut the labels alike: from_labels(labels[:, -n:]) for the last n "
        "columns, from_labels(labels[:, 1:], shift=False) for logits[:, :-1]"
    )


class _SegmentSum(torch.autograd.Function):
    """The kernels' weighted sums over sequences."""

    @staticmethod
    def forward(values: Tensor, weights: Tensor | None, seq_offsets: Tensor) -> Tensor:
        return ops.segment_sum(values, weights, seq_offsets)

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
    if grad.dtype == torch.float32 and ops.called_plainly(grad):
        return ops.segment_grad(grad, weights, seq_offsets, tokens)
    place = torch.arange(tokens, dtype=torch.int32, device=grad.device)
    g = grad.index_select(0, torch.bucketize(place, seq_offsets[1:], right=True))
    return g if weights is None else torch.where(weights != 0, g * weights, 0.0)
