"""The products of the linear head, added in float32 and rounded once.

Letters: C rows of a chunk, H hidden, V vocabulary.

A GPU multiplies half-width matrices into float32. A CPU without instructions for them takes ten
times as long as for float32, so there they are widened a tile of the vocabulary at a time: the same
sums, rounded at the same place, in memory that does not grow with V. A CPU with instructions for
bfloat16 adds in float32 inside a product and rounds what leaves it: the gradient of a weight that
one product makes is one such, and several are added in float32 by tiles, as they would be rounded
each.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
TILE = 2048
"""Rows of the weight that are widened at a time: 32 MB at H = 4096."""
# What oneDNN may be held to, below its instructions for bfloat16; torch knows only the CPU.
_WITHOUT_BFLOAT16 = (
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
)


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16, and oneDNN may use them.

    Asked of the CPU: `get_cpu_capability` is what torch's own loops were told to use, and products
    are not among them.
    """
    held = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if held.upper() in _WITHOUT_BFLOAT16:
        return False
    return any(
        getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")
    )


_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_IS_OLD = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2")
SLOW_HALVES = {
    torch.bfloat16: not _multiplies_bfloat16() if _IS_X86 else _IS_OLD,
    torch.float16: _IS_OLD,
}
"""Whether this CPU is better given a dtype in float32."""


def logits_into(z: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``z = x @ weight.t() + bias``, (C, V)."""
    widen = by_tiles(z)
    if z.device.type != "cpu" or (z.dtype in HALVES and not widen):
        if bias is None:
            return torch.mm(x, weight.t(), out=z)
        return torch.addmm(bias, x, weight.t(), out=z)
    dtype = torch.float32 if widen else z.dtype
    x = x.to(dtype)
    V = weight.shape[0]
    # A compiled graph takes no `out=` with gaps between its rows.
    copies = widen or torch.compiler.is_compiling()
    for tile in tiles(V):  # a tile stays in the cache: 1.15x the speed of the whole
        given, place = part(weight, tile).to(dtype).t(), z if V <= TILE else z[:, tile]
        made = torch.mm(x, given) if copies else torch.mm(x, given, out=place)
        if bias is not None:
            made.add_(part(bias, tile))
        if copies:
            place.copy_(made)
    return z


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of (C, V) and (V, H), added in float32; in half width also given in float32 where
    that is how it is computed, so that no split is rounded, and in float16 always: gradients that
    were scaled up to its range would leave it.
    """
    if a.is_cuda and a.dtype in HALVES:
        return torch.mm(a, b, out_dtype=torch.float32)
    if not by_tiles(a) and a.dtype != torch.float16:
        return torch.mm(a, b)
    total = torch.zeros(a.shape[0], b.shape[1], device=a.device)
    for tile in tiles(b.shape[0]):
        torch.addmm(total, a[:, tile].float(), b[tile].float(), out=total)
    return total


def add_product(total: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """``total = dz^T x`` or ``total += dz^T x``, (V, H), total in float32 (float64 for float64);
    or in the dtype of dz, where it is made by one call.
    """
    beta, a = 0 if first else 1, dz.t()
    if a.dtype == total.dtype:
        torch.addmm(total, a, x.to(total.dtype), beta=beta, out=total)
    elif a.is_cuda and x.dtype == a.dtype:
        torch.addmm(total, a, x, beta=beta, out_dtype=total.dtype, out=total)
    else:  # the CPU has no product of one dtype into another, and nobody has one of two dtypes
        x = x.to(total.dtype)
        for tile in tiles(total.shape[0]):
            sums = part(total, tile)
            torch.addmm(sums, part(a, tile).to(total.dtype), x, beta=beta, out=sums)


def by_tiles(a: Tensor) -> bool:
    """Whether half-width matrices on this device are better widened."""
    return a.device.type == "cpu" and SLOW_HALVES.get(a.dtype, False)


def tiles(V: int) -> Iterator[slice]:
    for start in range(0, V, TILE):
        yield slice(start, min(start + TILE, V))


def part(values: Tensor, some: slice) -> Tensor:
    """Some rows; all of them take no operator."""
    if some.start == 0 and some.stop == values.shape[0]:
        return values
    return values[some.start : some.stop]


def joined(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """One after the other; a single part takes no operator."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def new_sum(
    shape: tuple[int, ...], like: torch.dtype, device: torch.device, tokens: int, chunks: int = 0
) -> Tensor:
    """What `add_product` fills: zeros only where there is no token, since the first one writes.

    Args:
        chunks: products that will be added, 0 if that is not known. Of one alone nothing is gained
            in float32 where the CPU multiplies bfloat16 into bfloat16.
    """
    make = torch.empty if tokens else torch.zeros
    is_one = chunks == 1 and like == torch.bfloat16 and device.type == "cpu"
    dtype = like if is_one and not SLOW_HALVES[like] else wide(like)
    return make(shape, dtype=dtype, device=device)


def times(total: Tensor, factor: Tensor | None, dtype: torch.dtype, own: bool) -> Tensor:
    """``total * factor`` in another dtype; with ``own`` no second one of the dtype of the sum, and
    ``total`` may be written over. None is a factor of 1.
    """
    if factor is None:
        return total.to(dtype)
    if own and total.is_cuda and dtype != total.dtype:  # one pass, where a CPU would make two
        return torch.mul(total, factor, out=torch.empty_like(total, dtype=dtype))
    return (total.mul_(factor) if own else total * factor).to(dtype)


def room(largest: Tensor, slope: float) -> Tensor:
    """The power of 2 that lifts gradients of logits to the top of float16.

    ``dz = g * (onehot - p) * dy/dz`` is at most ``|g| * slope``; what is returned takes the largest
    such ``g`` above 32752 and not beyond 65504, so that of p as much stays as any loss scale could
    have kept. No number is looked at.

    Args:
        largest: scalar, the largest ``|g|``, float32; 0 answers a number that is never smallest.
        slope: >= 0, the largest ``dy/dz``.

    >>> room(torch.tensor([2.0**-20, 65504.0, 1e-3]), 1.0)
    tensor([3.4360e+10, 1.0000e+00, 3.3554e+07])
    """
    part, exponent = torch.frexp((largest * slope).clamp(2.0**-90, 2.0**120))
    return torch.ldexp(torch.ones_like(part), 16 - exponent - (part * 65536 > 65504).int())


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
