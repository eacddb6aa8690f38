"""`segment_attention`: attention that costs what its segments cost, not the square of a row.

Letters: R rows, T slots of a row, H heads, K heads of keys and values, D and E their sizes.
Inside: X batches, g = H / K query heads of one key head, n queries, m keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from dpo_ext.layout.graphs import outside_graphs
from dpo_ext.layout.segments import Segments
from dpo_ext.torch.flash_cpu import flash, serves
from dpo_ext.torch.pieces import BLOCK, Call, blocks, call_of, plan_of

Backend = Literal["auto", "pieces", "varlen", "flash_attn"]


@outside_graphs("where segments begin is a value, no shape")
def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention within the segments of packed or shared rows.

    Same as, with the (R, 1, T, T) mask that is never built here::

        scores  = scale * query @ key.mT                      # key heads repeated for their queries
        scores  = softcap * tanh(scores / softcap)            # with a softcap
        scores  = where(SegmentMask.of(segments, window).dense(), scores, -inf)
        weights = softmax(concat([scores, sinks]))[..., :T]   # with sinks, one more score a head
        result  = (dropout(weights) @ value).transpose(1, 2)

    ``softmax_k(s_qk) = exp(s_qk) / (exp(sink) + sum_j exp(s_qj))``. Softcap: Gemma 2,
    arXiv:2408.00118; sinks: gpt-oss; windows: Beltagy et al. 2020, arXiv:2004.05150.

    Time and memory are linear in tokens for segments of like length, and with a window also in the
    length of a segment. On a CPU, segment by segment, views of what is given, through torch's
    ``scaled_dot_product_attention``; segments of fewer than 64 keys many at a time. On CUDA
    torch's varlen attention or flash-attn's, where one is there and takes the arguments, else as on
    a CPU. A softcap or sinks materialise the scores of 256 queries at a time, and again backward.

    Args:
        query: (R, H, T, D), as transformers gives it. Any floating dtype.
        key, value: (R, K, T, D) and (R, K, T, E), H a multiple of K.
        segments: which slots see each other.
        window: positions that a query sees, its own included; None for all before it.
        scale: factor of the scores; None for ``D ** -0.5``.
        softcap: None for none.
        sinks: (H,), differentiable, or None.
        dropout: probability that a weight is dropped.
        backend: ``"auto"``, ``"pieces"`` (segment by segment), ``"varlen"`` (torch's, CUDA, 16
            bits) or ``"flash_attn"``.

    Returns:
        (R, T, H, E), contiguous; differentiable.

    Raises:
        ValueError: shapes do not fit ``segments``, or an unknown ``backend``.

    Numerics: as torch's attention in this dtype, under autocast in that of autocast; scores with
    softcap or sinks in float32. Which segments are in a row changes nothing but rounding.

    >>> import numpy as np
    >>> segments = Segments((1, 5), np.array([0, 2, 5]))
    >>> value = torch.arange(5.0).view(1, 1, 5, 1)
    >>> zeros = torch.zeros_like(value)
    >>> segment_attention(zeros, zeros, value, segments)[0, :, 0, 0]
    tensor([0.0000, 0.5000, 2.0000, 2.5000, 3.0000])
    """
    rows, width = query.shape[::2]
    if (rows, width) != segments.shape or key.shape[2] != width:
        raise ValueError(
            f"`segments` are of rows {segments.shape}, found queries {(rows, width)} and "
            f"{key.shape[2]} keys"
        )
    query, key, value = as_autocast_has_them(query, key, value)
    options: dict[str, Any] = {"softcap": softcap, "sinks": sinks, "dropout": dropout}
    call = call_of(query, segments, window=window, scale=scale, **options)
    if backend == "auto":
        backend = choose(call, query, value)
    if backend == "pieces":
        return _pieces(query, key, value, segments, call)
    if backend not in ("varlen", "flash_attn"):
        raise ValueError(
            f"`backend` must be one of auto, pieces, varlen, flash_attn, found {backend!r}"
        )
    return _varlen(query, key, value, segments, call, backend)


def as_autocast_has_them(*tensors: Tensor) -> Iterator[Tensor]:
    """In the dtype of autocast where that is on, as it gives them to torch's own attention: the
    positions may have made queries and keys float32 beside values of 16 bits.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return iter(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return (t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


# ---- kernels over all segments at once (CUDA) ----------------------------------------------------


@cache
def installed() -> frozenset[str]:
    """Which kernels are there; FlexAttention's are compiled by Triton."""
    specs = {"varlen": "torch.nn.attention.varlen", "flash_attn": "flash_attn", "flex": "triton"}
    return frozenset(name for name, module in specs.items() if find_spec(module) is not None)


def choose(call: Call, query: Tensor, value: Tensor) -> Backend:
    """The fastest way that is right for a call: both kernels want CUDA and 16 bits, neither knows
    sinks, torch's knows no softcap and no dropout.
    """
    size = query.shape[-1]
    kernel = query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16)
    if not kernel or size > 256 or value.shape[-1] != size or call.sinks is not None:
        return "pieces"
    if "varlen" in installed() and call.softcap is None and not call.dropout:
        return "varlen"
    return "flash_attn" if "flash_attn" in installed() else "pieces"


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, call: Call, backend: str
) -> Tensor:
    rows, heads, width, _ = query.shape
    arrays = segments.on(query.device)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    if segments.prefixes is not None:
        k, v = k[arrays["key_slots"]], v[arrays["key_slots"]]
    longest = int(np.diff(segments.offsets).max(initial=0)), segments.longest
    window = (-1 if call.window is None else call.window - 1, 0)
    given = (q, k, v, arrays["offsets"], arrays["key_offsets"], *longest)
    if backend == "varlen":
        groups = heads // key.shape[1]
        k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))
        more: dict[str, Any] = {"scale": call.scale, "window_size": window}
        varlen = import_module("torch.nn.attention.varlen")  # from torch 2.10 on
        out: Any = varlen.varlen_attn(q, k, v, *given[3:], **more)
    else:
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            *given,
            dropout_p=call.dropout,
            softmax_scale=call.scale,
            causal=True,
            window_size=window,
            softcap=call.softcap or 0.0,
        )
    result: Tensor = out.view(rows, width, heads, -1)
    return result


# ---- segment by segment --------------------------------------------------------------------------


def _pieces(query: Tensor, key: Tensor, value: Tensor, segments: Segments, call: Call) -> Tensor:
    rows, heads, width, _ = query.shape
    plan = plan_of(segments, query.device)
    K = key.shape[1]
    shape = (rows, width, heads, value.shape[-1])
    if not rows * width:
        return query.new_zeros(shape)
    if serves(query, call):
        return flash(query, key, value, plan, call)
    spans = [(row, a, b) for row, p, q, a, b in plan.alone for a, b in ((p, q), (a, b)) if a < b]
    parts = [iter(_Spans.apply(t, spans)) if spans else iter(()) for t in (query, key, value)]
    found: list[Tensor] = []
    for _, p, q, _, _ in plan.alone:
        # A prefix is worked off with the segment as if it were its own: no mask is needed then.
        whole = [torch.cat([next(x), next(x)], 1) if p < q else next(x) for x in parts]
        out = _attend(_grouped([t[None] for t in whole], K), call)[:, :, q - p :]
        found.append(out.flatten(0, 1).transpose(0, 1))
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)] if plan.groups else []
    for slots, _ in plan.groups:
        many = [t.index_select(0, slots.flatten()).unflatten(0, slots.shape) for t in flat]
        given = _grouped([t.transpose(1, 2) for t in many], K)
        out = _attend(given, call).unflatten(0, (len(slots), K)).flatten(1, 2)
        found.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(found)
    if plan.place is not None:
        out = out.index_select(0, plan.place)
    return out.view(shape)


def _grouped(tensors: list[Tensor], K: int) -> tuple[Tensor, Tensor, Tensor]:
    """(G, H, n, D), (G, K, m, D) as (G * K, g, n, D), (G * K, 1, m, D): no key is repeated."""
    query, key, value = tensors
    g = query.shape[1] // K
    q = query.unflatten(1, (K, g)).flatten(0, 1)
    return q, key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None]


class _Spans(torch.autograd.Function):
    """Views of slots a to b of a row, for many (row, a, b) at once, which may overlap.

    Slicing so often would fill a gradient of all slots for each slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: list[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        ctx.spans, ctx.like = spans, (x.shape, x.dtype, x.device)
        # Detached: they are nobody's views for autograd, which would forbid more than one.
        return tuple(x[row, :, a:b].detach() for row, a, b in spans)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows, heads, width, size), dtype, device = ctx.like
        # Tokens before heads, as a model has them.
        total = torch.zeros(rows, width, heads, size, dtype=dtype, device=device).transpose(1, 2)
        for (row, a, b), grad in zip(ctx.spans, grads, strict=True):
            total[row, :, a:b].add_(grad)
        return total, None


def _attend(tensors: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
    """Causal attention of whole sequences, (X, g, n, D) with (X, 1, n, D), in as many blocks as a
    window or materialised scores want.
    """
    query, key, value = tensors
    n, window = query.shape[2], call.window
    if not call.plain:
        return _explicit(query, key, value, call)
    if window is None or window >= n:
        return _fused(query, key, value, call, None)
    spans, masks = [], []
    for queries, keys, _, mask in blocks(n, 0, window, query):
        spans.append((queries, keys))
        masks.append(mask)
    ks, vs = (
        _Spans.apply(t.transpose(0, 1), [(0, k0, k1) for _, (k0, k1) in spans])
        for t in (key, value)
    )
    qs = query.split([b - a for (a, b), _ in spans], 2)
    outs = [
        _fused(q, k[:, None], v[:, None], call, mask)
        for q, k, v, mask in zip(qs, ks, vs, masks, strict=True)
    ]
    return torch.cat(outs, 2)


def _fused(query: Tensor, key: Tensor, value: Tensor, call: Call, mask: Tensor | None) -> Tensor:
    size = value.shape[-1]
    short = query.shape[-1] - size
    if short:  # the fused kernels want one size
        value = F.pad(value, (0, max(short, 0)))
        query, key = (F.pad(t, (0, max(-short, 0))) for t in (query, key))
    g = query.shape[1]
    out = F.scaled_dot_product_attention(
        query,
        key.expand(-1, g, -1, -1),
        value.expand(-1, g, -1, -1),
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=mask is None,
        scale=call.scale,
    )
    return out[..., :size]


def _explicit(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """With softcap or sinks: block by block of queries, each forgotten until backward."""
    n = query.shape[2]
    outs = []
    for a in range(0, n, BLOCK):
        b = min(a + BLOCK, n)
        first = 0 if call.window is None else max(0, a - call.window + 1)
        given = query[:, :, a:b], key[:, :, first:b], value[:, :, first:b], call, a - first
        if torch.is_grad_enabled() and n > BLOCK:
            outs.append(checkpoint(_scored, *given, use_reentrant=False))
        else:
            outs.append(_scored(*given))
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def _scored(query: Tensor, key: Tensor, value: Tensor, call: Call, before: int) -> Tensor:
    """The equation itself, of queries that have ``before`` keys before the first of them."""
    scores = (query @ key.mT * call.scale).float()
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    n, m = scores.shape[-2:]
    band = torch.ones(n, m, dtype=torch.bool, device=scores.device).tril_(before)
    if call.window is not None:
        band = band.triu_(before - call.window + 1)
    scores = scores.masked_fill(~band, float("-inf"))
    if call.sinks is not None:
        X, g = scores.shape[:2]
        sinks = call.sinks.float().view(-1, g).repeat(X * g // call.sinks.numel(), 1)
        scores = torch.cat([scores, sinks[:, :, None, None].expand(X, g, n, 1)], -1)
    weights = scores.softmax(-1)[..., :m].to(value.dtype)
    return F.dropout(weights, call.dropout) @ value
