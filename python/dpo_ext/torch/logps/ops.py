"""The four operators of the log-prob head: CPU in Rust, CUDA through CuPy.

Importing this module declares ``torch.ops.dpo_ext.token_stats``, ``.logits_grad``,
``.logits_grad_`` and ``.segment_sum`` with ``torch.library``. They know no autograd: the
``autograd.Function`` that joins them is in ``dpo_ext.torch.logps.logits``.

Shapes: R rows of V logits, M tokens, S sequences. Transform of a row: ``y = logit_scale * z``,
then ``softcap * tanh(y / softcap)`` if ``softcap`` is not 0, then ``/ temperature``. Every check
here looks at shapes, dtypes and devices alone, so that nothing waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_ext import _core
from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.graphs import outside_graphs
from dpo_ext.torch.logps import cuda as kernels
from dpo_ext.torch.logps.scratch import lent
from dpo_ext.torch.numbers import transformed

# What the kernels read. The torch twin (`impl="torch"`) also takes float64.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# What stands for the statistics that nobody asked for: four tensors less to make a call.
_NO_STATS = tuple(
    torch.empty(0, dtype=dtype, device="cpu") for dtype in (*(torch.float32,) * 3, torch.bool)
)

Sums = tuple[Tensor | None, Tensor | None]
"""Weights and borders of the sequences that log-probs are added up over, or nothing."""
NO_SUMS: Sums = (None, None)

_modes = torch._C._len_torch_dispatch_stack  # noqa: SLF001 - no public name
_profiled = torch._C._autograd._profiler_enabled  # noqa: SLF001 - no public name

_LIBRARY = torch.library.Library("dpo_ext", "DEF")
_TRANSFORM = "float logit_scale, float softcap, float temperature"
_SAVED = "Tensor? logit_rows, Tensor targets, Tensor row_max, Tensor row_rest, Tensor grad"
_LIBRARY.define(
    f"token_stats(Tensor logits, Tensor? logit_rows, Tensor targets, {_TRANSFORM}, bool stats)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("segment_sum(Tensor values, Tensor? weights, Tensor seq_offsets) -> Tensor")
_LIBRARY.define(f"logits_grad(Tensor logits, {_SAVED}, {_TRANSFORM}) -> Tensor")
_LIBRARY.define(f"logits_grad_(Tensor(a!) logits, {_SAVED}, {_TRANSFORM}) -> ()")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor):
    if tensor.dtype != dtype or tensor.shape != shape:
        expected = f"{describe(dtype)} of shape {tuple(shape)}"
        raise TensorError(f"`{name}` must be {expected}, found {describe(tensor)}")
    if tensor.device != like.device:
        raise TensorError(f"`{name}` must be on {like.device}, found {tensor.device}")


def _check_logits(logits: Tensor) -> None:
    if logits.dtype not in DTYPES:
        names = ", ".join(DTYPES.values())
        hint = '\nhint: use impl="torch"' if logits.dtype == torch.float64 else ""
        found = describe(logits.dtype)
        raise TensorError(f"`logits` must have one of the dtypes {names}, found {found}{hint}")
    if logits.ndim != 2:
        raise TensorError(f"`logits` must have shape (R, V), found {tuple(logits.shape)}")
    rows, columns = logits.shape
    if logits.stride(1) != 1 and columns > 1:
        raise TensorError(
            f"`logits` must have stride 1 along the vocabulary, found {logits.stride(1)}"
            "\nhint: call .contiguous()"
        )
    if rows > 1 and logits.stride(0) < columns:
        raise TensorError(
            f"`logits` must have a row stride of at least V = {columns}, found {logits.stride(0)}"
            "\nhint: rows that share memory cannot hold a gradient each; call .contiguous()"
        )


def _check_transform(logit_scale: float, softcap: float, temperature: float) -> None:
    for name, value in (("logit_scale", logit_scale), ("temperature", temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be finite and above 0, found {value}")
    if softcap != 0 and not 0 < softcap < math.inf:
        raise ValueError(f"`softcap` must be finite and above 0, or 0 for none, found {softcap}")


def _check_token_stats(
    logits: Tensor, logit_rows: Tensor | None, targets: Tensor, *transform: float
):
    _check_logits(logits)
    shape = logits.shape[:1]
    if logit_rows is not None:
        if logit_rows.ndim != 1:
            raise TensorError(f"`logit_rows` must have shape (M,), found {tuple(logit_rows.shape)}")
        shape = logit_rows.shape
        _check("logit_rows", logit_rows, torch.int64, shape, logits)
    _check("targets", targets, torch.int32, shape, logits)
    _check_transform(*transform)


def _check_logits_grad(logits, logit_rows, targets, row_max, row_rest, grad, *transform):
    _check_token_stats(logits, logit_rows, targets, *transform)
    shape = targets.shape
    for name, tensor in (("row_max", row_max), ("row_rest", row_rest), ("grad", grad)):
        _check(name, tensor, torch.float32, shape, logits)


def _check_segment_sum(values: Tensor, weights: Tensor | None, seq_offsets: Tensor) -> None:
    if values.ndim != 1:
        raise TensorError(f"`values` must have shape (M,), found {tuple(values.shape)}")
    _check("values", values, torch.float32, values.shape, values)
    if weights is not None:
        _check("weights", weights, torch.float32, values.shape, values)
    if seq_offsets.ndim != 1 or seq_offsets.shape[0] == 0:
        raise TensorError(
            f"`seq_offsets` must have shape (S + 1,), found {tuple(seq_offsets.shape)}"
        )
    _check("seq_offsets", seq_offsets, torch.int32, seq_offsets.shape, values)


def _implement(device: str, bodies: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    hidden = {name: outside_graphs()(body) for name, body in bodies.items()}
    for name, body in hidden.items():
        _LIBRARY.impl(name, body, device)
    return hidden


def called_plainly(tensor: Tensor) -> bool:
    """Whether nobody would see a call pass the dispatcher, which takes longer than a small fold:
    a plain tensor of the CPU, and no compiler, transform, mode or profiler at work.
    """
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not transformed()
        and not _modes()
        and not _profiled()
    )


def token_stats(
    logits: Tensor,
    logit_rows: Tensor | None,
    targets: Tensor,
    transform: tuple[float, float, float],
    stats: bool,
    sums: Sums = NO_SUMS,
) -> tuple[Tensor, ...]:
    """``torch.ops.dpo_ext.token_stats``; with ``(weights, seq_offsets)`` the sums of sequences in
    place of the log-probs. Without ``logit_rows`` token i has row i.
    """
    weights, seq_offsets = sums
    if called_plainly(logits):
        return _stats_on_cpu(logits, logit_rows, targets, transform, stats, sums)
    logps, *others = torch.ops.dpo_ext.token_stats(logits, logit_rows, targets, *transform, stats)
    if seq_offsets is not None:
        logps = torch.ops.dpo_ext.segment_sum(logps, weights, seq_offsets)
    return (logps, *others)


def logits_grad(logits: Tensor, *saved: Any) -> Tensor:
    """``torch.ops.dpo_ext.logits_grad``."""
    if called_plainly(logits):
        return _ON_CPU["logits_grad"](logits, *saved)
    return torch.ops.dpo_ext.logits_grad(logits, *saved)


def logits_grad_(logits: Tensor, *saved: Any) -> None:
    """``torch.ops.dpo_ext.logits_grad_``: the gradient over the logits."""
    if called_plainly(logits):
        _ON_CPU["logits_grad_"](logits, *saved)
    else:
        torch.ops.dpo_ext.logits_grad_(logits, *saved)


def segment_sum(values: Tensor, weights: Tensor | None, seq_offsets: Tensor) -> Tensor:
    """``torch.ops.dpo_ext.segment_sum``."""
    if called_plainly(values):
        return _ON_CPU["segment_sum"](values, weights, seq_offsets)
    return torch.ops.dpo_ext.segment_sum(values, weights, seq_offsets)


# ---- CPU ------------------------------------------------------------


def _stride(logits: Tensor) -> int:
    """Row stride in elements; a single row may carry any."""
    return logits.stride(0) if logits.shape[0] > 1 else logits.shape[1]


def _flat(logits: Tensor):
    """The memory from first to last logit as an array, half-width types as uint16; no copy."""
    memory = logits.detach()
    if not logits.is_contiguous():
        rows, columns = logits.shape
        length = (rows - 1) * _stride(logits) + columns if rows and columns else 0
        memory = memory.as_strided((length,), (1,))
    return (memory if memory.dtype == torch.float32 else memory.view(torch.uint16)).numpy()


def _array(tensor: Tensor):
    tensor = tensor.contiguous()
    return (tensor.detach() if tensor.requires_grad else tensor).numpy()


def _rows(logit_rows: Tensor | None, targets: Tensor) -> Any:
    return np.arange(targets.shape[0]) if logit_rows is None else _array(logit_rows)


def _shape_of(logits: Tensor) -> tuple[int, int, int]:
    return logits.shape[0], logits.shape[1], _stride(logits)


def _token_stats_cpu(logits, logit_rows, targets, logit_scale, softcap, temperature, stats):
    transform = (logit_scale, softcap, temperature)
    _check_token_stats(logits, logit_rows, targets, *transform)
    return _stats_on_cpu(logits, logit_rows, targets, transform, stats, NO_SUMS)


@outside_graphs()
def _stats_on_cpu(logits, logit_rows, targets, transform, stats, sums):
    weights, seq_offsets = sums
    columns = _core.token_stats(
        _flat(logits),
        DTYPES[logits.dtype],
        _shape_of(logits),
        _rows(logit_rows, targets),
        _array(targets),
        tuple(transform),
        stats,
        torch.get_num_threads(),
        None
        if seq_offsets is None
        else (None if weights is None else _array(weights), _array(seq_offsets)),
    )
    values = map(torch.from_numpy, columns if stats else columns[:3])
    return (*values, *(() if stats else _NO_STATS))


def _grad_arguments(logits, logit_rows, targets, row_max, row_rest, grad, transform):
    _check_logits_grad(logits, logit_rows, targets, row_max, row_rest, grad, *transform)
    table = (_array(t) for t in (targets, row_max, row_rest, grad))
    rows = _rows(logit_rows, targets)
    return (_flat(logits), DTYPES[logits.dtype], _shape_of(logits), rows, *table, transform)


def _logits_grad_cpu(
    logits, logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature
):
    transform = (logit_scale, softcap, temperature)
    arguments = _grad_arguments(logits, logit_rows, targets, row_max, row_rest, grad, transform)
    out = lent(logits.shape, logits.dtype, logits.device)
    _core.logits_grad(*arguments, _flat(out), torch.get_num_threads())
    return out


def _logits_grad_in_place_cpu(
    logits, logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature
):
    transform = (logit_scale, softcap, temperature)
    arguments = _grad_arguments(logits, logit_rows, targets, row_max, row_rest, grad, transform)
    _core.logits_grad_(*arguments, torch.get_num_threads())
    _bump(logits)


def _bump(logits: Tensor) -> None:
    """Tells autograd of the write: the schema's ``Tensor(a!)`` alone does not."""
    if not logits.is_inference():
        torch.autograd.graph.increment_version(logits)


@outside_graphs()
def segment_grad(grad, weights, seq_offsets, tokens):
    """(tokens,) gradients of log-probs from those of their weighted sums, on the CPU."""
    arrays = (_array(grad), None if weights is None else _array(weights), _array(seq_offsets))
    return torch.from_numpy(_core.segment_grad(*arrays, tokens))


def _segment_sum_cpu(values, weights, seq_offsets):
    _check_segment_sum(values, weights, seq_offsets)
    arrays = (_array(values), None if weights is None else _array(weights), _array(seq_offsets))
    return torch.from_numpy(_core.segment_sum(*arrays))


_ON_CPU = _implement(
    "CPU",
    {
        "token_stats": _token_stats_cpu,
        "logits_grad": _logits_grad_cpu,
        "logits_grad_": _logits_grad_in_place_cpu,
        "segment_sum": _segment_sum_cpu,
    },
)


# ---- CUDA ------------------------------------------------------------


def _token_stats_cuda(logits, logit_rows, targets, logit_scale, softcap, temperature, stats):
    transform = (logit_scale, softcap, temperature)
    _check_token_stats(logits, logit_rows, targets, *transform)
    return kernels.token_stats(logits, logit_rows, targets, *transform, stats)


def _logits_grad_cuda(
    logits, logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature
):
    arguments = (logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature)
    _check_logits_grad(logits, *arguments)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    kernels.logits_grad(logits, *arguments, out)
    return out


def _logits_grad_in_place_cuda(
    logits, logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature
):
    arguments = (logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature)
    _check_logits_grad(logits, *arguments)
    kernels.logits_grad(logits, *arguments, logits)
    _bump(logits)


def _segment_sum_cuda(values, weights, seq_offsets):
    _check_segment_sum(values, weights, seq_offsets)
    return kernels.segment_sum(values, weights, seq_offsets)


_implement(
    "CUDA",
    {
        "token_stats": _token_stats_cuda,
        "logits_grad": _logits_grad_cuda,
        "logits_grad_": _logits_grad_in_place_cuda,
        "segment_sum": _segment_sum_cuda,
    },
)


# ---- shapes alone: meta and fake tensors ------------------------------


@torch.library.register_fake("dpo_ext::token_stats", lib=_LIBRARY)
def _token_stats_fake(logits, logit_rows, targets, logit_scale, softcap, temperature, stats):
    _check_token_stats(logits, logit_rows, targets, logit_scale, softcap, temperature)
    tokens = targets.shape[0]
    three = [logits.new_empty(tokens, dtype=torch.float32) for _ in range(3)]
    kept = tokens if stats else 0
    more = [logits.new_empty(kept, dtype=torch.float32) for _ in range(3)]
    return (*three, *more, logits.new_empty(kept, dtype=torch.bool))


@torch.library.register_fake("dpo_ext::logits_grad", lib=_LIBRARY)
def _logits_grad_fake(
    logits, logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature
):
    transform = (logit_scale, softcap, temperature)
    _check_logits_grad(logits, logit_rows, targets, row_max, row_rest, grad, *transform)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.register_fake("dpo_ext::logits_grad_", lib=_LIBRARY)
def _logits_grad_in_place_fake(
    logits, logit_rows, targets, row_max, row_rest, grad, logit_scale, softcap, temperature
):
    transform = (logit_scale, softcap, temperature)
    _check_logits_grad(logits, logit_rows, targets, row_max, row_rest, grad, *transform)


@torch.library.register_fake("dpo_ext::segment_sum", lib=_LIBRARY)
def _segment_sum_fake(values, weights, seq_offsets):
    _check_segment_sum(values, weights, seq_offsets)
    return values.new_empty(seq_offsets.shape[0] - 1, dtype=torch.float32)
