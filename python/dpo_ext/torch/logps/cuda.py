"""Launches the CUDA kernels of ``dpo_ext/cuda`` through CuPy; the only importer of CuPy.

NVRTC compiles a kernel at its first use, for the device at hand; CuPy keeps the result in its cache
folder, keyed by the source, into which the header is joined. Memory, streams and devices are
torch's: a kernel runs on torch's current stream of the tensor's device, and CuPy gets addresses.

Shapes: R rows of V logits, M tokens, S sequences. Callers have checked shapes, dtypes and devices
(``dpo_ext.torch.logps.ops``). Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpo_ext import extras
from dpo_ext.errors import KernelCompileError, KernelUnavailable, TensorError

CUDA_FOLDER = Path(__file__).resolve().parents[2] / "cuda"
OPTIONS = ("-std=c++17",)  # CuPy adds -ftz=true, the architecture and the include folders
THREADS = 256  # of every block; `THREADS` of reduce.cuh
MAX_TILES = 64  # `MAX_TILES` of reduce.cuh
MAX_GRID_X = 2**31 - 1
PART_FLOATS = 6  # a `Part` of reduce.cuh
ROW_GRAD_INTS = 4  # a `RowGrad` of logits_grad.cu

MAPS = ("PLAIN", "SCALED", "CAPPED")  # `Map` of reduce.cuh
TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}

# Type of every parameter, in order: p pointer, l long long, i int, f float. CuPy checks nothing: an
# int goes as 8 bytes and a float as a double, so each argument is converted by this table, and a
# test reads the same list out of the .cu files.
PARAMETERS = {
    "token_stats": "ppppppppppplliiiff",
    "token_stats_finish": "pppppppppppllliiff",
    "grad_rows": "pppppppllliff",
    "logits_grad": "pppllliiff",
    "segment_sum": "ppppl",
}
FILES = {
    "token_stats": "token_stats.cu",
    "token_stats_finish": "token_stats.cu",
    "grad_rows": "logits_grad.cu",
    "logits_grad": "logits_grad.cu",
    "segment_sum": "segment_sum.cu",
}
_CONVERT: dict[str, Any] = {"p": int, "l": np.int64, "i": np.int32, "f": np.float32}


class Stream(NamedTuple):
    """What CuPy reads of a stream."""

    ptr: int


def source(file: str) -> str:
    """Text of a kernel file with the header joined in, so that CuPy's cache key covers both."""
    include = '#include "reduce.cuh"\n'
    header = (CUDA_FOLDER / "reduce.cuh").read_text().replace("#pragma once\n", "\n")
    before, after = (CUDA_FOLDER / file).read_text().split(include)
    line = before.count("\n") + 2
    return f'{before}#line 1 "reduce.cuh"\n{header}#line {line} "{file}"\n{after}'


def name_expression(kernel: str, template: tuple[str, ...]) -> str:
    """The instantiation as NVRTC names it, for example ``token_stats<float, PLAIN, true>``."""
    return f"{kernel}<{', '.join(template)}>" if template else kernel


def require() -> Any:
    """The module cupy; raises KernelUnavailable with what to install or change."""
    if not torch.cuda.is_available():
        raise KernelUnavailable(
            "no CUDA device: torch sees none"
            '\nhint: use impl="cpu" or impl="torch", or install a CUDA build of torch and a driver'
        )
    major = _torch_major()
    try:
        import cupy
        import cupy.cuda.compiler
    except ImportError as error:
        raise KernelUnavailable(
            f"the CUDA kernels need CuPy, which cannot be imported: {error}"
            f"\nhint: {extras.cupy(major)}"
        ) from error
    except OSError as error:
        # Importing cupy creates its cache folder.
        raise KernelUnavailable(
            f"CuPy cannot create its cache folder: {error}"
            "\nhint: set CUPY_CACHE_DIR to a folder that can be written, before Python starts"
        ) from error
    if cupy.cuda.runtime.is_hip:
        raise KernelUnavailable(f"this CuPy is built for ROCm\nhint: {extras.other_cupy(major)}")
    # A runtime works with every driver of its own major version and of later ones. An older CuPy
    # than torch therefore runs, if it finds an NVRTC; a newer one than the driver never does.
    built, driver = cupy.cuda.runtime.runtimeGetVersion(), cupy.cuda.runtime.driverGetVersion()
    if driver // 1000 < built // 1000:
        raise KernelUnavailable(
            f"this CuPy is built for CUDA {_version(built)}, "
            f"the driver supports CUDA {_version(driver)} at most"
            f"\nhint: {_other_cupy(built, major)}, or update the driver"
        )
    return cupy


def _torch_major() -> str:
    """Major version of the CUDA that torch brings."""
    return (torch.version.cuda or "13").split(".")[0]


def _version(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _other_cupy(built: int, major: str) -> str:
    return extras.other_cupy(major, installed=str(built // 1000))


@functools.cache
def _module(file: str, expressions: tuple[str, ...]) -> Any:
    return require().RawModule(
        code=source(file), options=OPTIONS, name_expressions=list(expressions)
    )


def _function(kernel: str, template: tuple[str, ...]) -> Any:
    """The kernel for the current device: compiled, or loaded from CuPy's cache, at first use."""
    cupy = require()
    # A module cannot be loaded inside a capture, and who asks without a driver gets an error.
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise KernelUnavailable(
            f"{name_expression(kernel, template)} was not loaded before this CUDA graph was begun"
            "\nhint: call dpo_ext.torch.warm_up(dtype, ...) or run one step before the capture"
        )
    family = [name for name, file in FILES.items() if file == FILES[kernel]]
    # The kernels of one file share their last template arguments; `grad_rows` and `logits_grad`,
    # `token_stats` and `token_stats_finish` always run together.
    module = _module(FILES[kernel], tuple(name_expression(name, template) for name in family))
    expression = name_expression(kernel, template)
    try:
        return module.get_function(expression)
    except cupy.cuda.compiler.CompileException as error:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
        options, log = " ".join(error.options), error.get_message()
        hint = ""
        if "open source file" in log:
            hint = f"\nhint: CUDA's headers are missing: {extras.cuda_toolkit(_torch_major())}"
        raise KernelCompileError(
            f"NVRTC refused {expression} for {arch}, options {options}:\n{log}{hint}"
        ) from error
    except RuntimeError as error:
        if "nvrtc" not in str(error).lower():
            raise
        major, built = _torch_major(), cupy.cuda.runtime.runtimeGetVersion()
        if str(built // 1000) != major:
            raise KernelUnavailable(
                f"this CuPy is built for CUDA {_version(built)}, torch for CUDA "
                f"{torch.version.cuda}, and no NVRTC can be loaded: {error}"
                f"\nhint: {_other_cupy(built, major)}"
            ) from error
        raise KernelUnavailable(
            f"CuPy cannot load NVRTC, which compiles the kernels: {error}"
            f"\nhint: install a CUDA build of torch, or {extras.cuda_toolkit(major)}"
        ) from error


@functools.cache
def _on_device(kernel: str, template: tuple[str, ...], index: int | None) -> Any:
    """The kernel of device ``index``, the current one: found once, since looking costs more than
    launching."""
    return _function(kernel, template)


def load(dtype: torch.dtype, how: str, stats: bool, device: torch.device) -> None:
    """All that scoring logits of one kind launches, ready on ``device``."""
    with torch.cuda.device(device):
        for kernel in FILES:
            template = (TYPES[dtype], how) if kernel != "segment_sum" else ()
            if kernel.startswith("token_stats"):
                template = (*template, _bool(stats))
            _on_device(kernel, template, device.index)


def launch(
    kernel: str,
    template: tuple[str, ...],
    grid: tuple[int, int],
    arguments: tuple[Any, ...],
    device: torch.device,
) -> None:
    """Runs ``grid`` blocks of ``THREADS`` threads on torch's current stream of ``device``."""
    converted = convert(kernel, arguments)
    with torch.cuda.device(device):
        # Asked at every launch: autograd runs backward on a thread with a stream of its own.
        stream = Stream(torch.cuda.current_stream(device).cuda_stream)
        run = _on_device(kernel, template, device.index)
        run(grid, (THREADS,), converted, stream=stream)


def convert(kernel: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments as CuPy must get them: tensors as addresses, numbers at the parameter's width."""
    types = PARAMETERS[kernel]
    if len(types) != len(arguments):
        raise TypeError(f"{kernel} takes {len(types)} arguments, found {len(arguments)}")
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    return tuple(_CONVERT[t](0 if a is None else a) for t, a in zip(types, addresses, strict=True))


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def blocks_at_once(kernel: str, how: str, stats: bool = False) -> int:
    """Blocks that a multiprocessor holds: what registers leave room for, as the tests hold it."""
    return 3 if kernel == "token_stats" and (stats or how == "CAPPED") else 4


def cut(rows: int, choices: Iterable[int], slots: int) -> int:
    """Into how many blocks to cut each row, so that the device is busy.

    A wave of blocks fills all slots, and the last one takes as long as a full one however few it
    has. The first of the choices, unless a later one keeps a tenth more of the slots at work.

    >>> cut(400, (1, 4), 528), cut(600, (1, 4), 528), cut(4096, (1, 4), 528)
    (1, 4, 1)
    """

    def busy(pieces: int) -> float:
        blocks = rows * pieces
        return blocks / (-(-blocks // slots) * slots)

    best, *others = choices
    for pieces in others:
        if busy(pieces) > 1.1 * busy(best):
            best = pieces
    return best


class Tiles(NamedTuple):
    """How a row is cut, by V alone: ``number`` tiles of ``columns`` columns."""

    columns: int
    number: int


def tiles(columns: int) -> Tiles:
    """Tiles of 32768 columns; of a multiple of that where there would be more than 64."""
    per_tile = 32768 * max(1, -(-columns // (32768 * MAX_TILES)))
    return Tiles(per_tile, max(1, -(-columns // per_tile)))


def transform_arguments(
    logit_scale: float, softcap: float, temperature: float
) -> tuple[str, float, float]:
    """(MAP, scale, cap): y = z, y = scale * z or y = cap * tanh(scale * z)."""
    if softcap != 0:
        return "CAPPED", logit_scale / softcap, softcap / temperature
    scale = logit_scale / temperature
    return "PLAIN" if scale == 1.0 else "SCALED", scale, 1.0


def _bool(value: bool) -> str:
    return "true" if value else "false"


def _stride(logits: Tensor) -> int:
    return logits.stride(0) if logits.shape[0] > 1 else logits.shape[1]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _nowhere(shape: tuple[int, ...], **of: Any) -> Tensor:
    """A table whose targets are none."""
    return torch.full(shape, -1, **of)


def _check_grid(name: str, blocks: int) -> None:
    if blocks > MAX_GRID_X:  # CuPy would cut it to 32 bits
        raise TensorError(f"`{name}` must have at most {MAX_GRID_X} elements, found {blocks}")


def token_stats(
    logits: Tensor,
    logit_rows: Tensor | None,
    targets: Tensor,
    logit_scale: float,
    softcap: float,
    temperature: float,
    stats: bool,
) -> tuple[Tensor, ...]:
    """``dpo_ext::token_stats``: one block a row, or one a tile where that keeps more busy."""
    tokens, (rows, columns) = targets.shape[0], logits.shape
    three = [logits.new_empty(tokens, dtype=torch.float32) for _ in range(3)]
    kept = tokens if stats else 0
    more = [logits.new_empty(kept, dtype=torch.float32) for _ in range(3)]
    out = (*three, *more, logits.new_empty(kept, dtype=torch.bool))
    if tokens == 0:
        return out
    _check_grid("logit_rows", tokens)
    how, scale, cap = transform_arguments(logit_scale, softcap, temperature)
    template = (TYPES[logits.dtype], how, _bool(stats))
    tile = tiles(columns)
    device, stride = logits.device, _stride(logits)
    if logit_rows is None:  # tried: a null pointer, for which other kernels take a register more
        logit_rows = torch.arange(tokens, device=device)
    table = (logit_rows.contiguous(), targets.contiguous())
    slots = processors(device) * blocks_at_once("token_stats", how, stats)
    pieces = cut(tokens, (1, tile.number), slots)
    parts = (
        logits.new_empty(tokens * pieces * PART_FLOATS, dtype=torch.float32) if pieces > 1 else None
    )
    first = (logits, *table, *out, parts)
    launch(
        "token_stats",
        template,
        (tokens, pieces),
        (*first, rows, stride, columns, tile.columns, tile.number, scale, cap),
        device,
    )
    if pieces > 1:
        launch(
            "token_stats_finish",
            template,
            (-(-tokens // THREADS), 1),
            (*first, tokens, rows, stride, columns, tile.number, scale, cap),
            device,
        )
    return out


def logits_grad(
    logits: Tensor,
    logit_rows: Tensor | None,
    targets: Tensor,
    row_max: Tensor,
    row_rest: Tensor,
    grad: Tensor,
    logit_scale: float,
    softcap: float,
    temperature: float,
    out: Tensor,
) -> None:
    """``dpo_ext::logits_grad`` into ``out``, which may be ``logits``."""
    tokens, (rows, columns) = targets.shape[0], logits.shape
    if rows == 0 or columns == 0:
        return
    _check_grid("logits", rows)
    _check_grid("logit_rows", tokens)
    device, stride = logits.device, _stride(logits)
    how, scale, cap = transform_arguments(logit_scale, softcap, temperature)
    template = (TYPES[logits.dtype], how)
    # Allocated before the first write: a failure leaves the logits as they were.
    make = torch.empty if logit_rows is None else _nowhere  # `grad_rows` then writes every entry
    table = make((rows, ROW_GRAD_INTS), dtype=torch.int32, device=device)
    if tokens:
        named = (logit_rows, targets, row_max, row_rest, grad)
        saved = (_contiguous(t) for t in named)
        arguments = (logits, *saved, table, tokens, rows, stride, columns, scale, cap)
        launch("grad_rows", template, (-(-tokens // THREADS), 1), arguments, device)
    # Pieces of 8192 columns or more.
    most = min(64, -(-columns // 8192))
    slots = processors(device) * blocks_at_once("logits_grad", how)
    pieces = cut(rows, range(1, most + 1), slots)
    piece = -(-columns // (8 * pieces)) * 8
    launch(
        "logits_grad",
        template,
        (rows, -(-columns // piece)),
        (logits, out, table, rows, stride, _stride(out), columns, piece, scale, cap),
        device,
    )


def segment_sum(values: Tensor, weights: Tensor | None, seq_offsets: Tensor) -> Tensor:
    """``dpo_ext::segment_sum``: one block a sequence."""
    sequences = seq_offsets.shape[0] - 1
    sums = values.new_empty(sequences, dtype=torch.float32)
    if sequences:
        _check_grid("seq_offsets", sequences)
        read = (_contiguous(t) for t in (values, weights, seq_offsets))
        arguments = (*read, sums, values.shape[0])
        launch("segment_sum", (), (sequences, 1), arguments, values.device)
    return sums
