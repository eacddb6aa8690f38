"""All segments of a layer in one node, by torch's flash attention for a CPU.

That kernel also gives the log of each query's sum of exponentials, and its backward takes it. So
the keys of a query may come in several parts, each attended alone: what the parts give is weighted
by their sums, ``out = sum_i exp(lse_i - lse) out_i, lse = logsumexp_i lse_i``, and backward of each
part with ``out`` and ``lse`` of the whole is exact. A sink is a part with a value of 0.

Letters as in segments.py: X batches, K key heads of g query heads each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dpo_ext.torch.pieces import Call, Group, Plan, Span, blocks

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


def serves(query: Tensor, call: Call) -> bool:
    """Whether the kernel knows what a call asks for."""
    floats = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return (
        query.device.type == "cpu"
        and query.dtype in floats
        and call.softcap is None
        and not call.dropout
    )


def flash(query: Tensor, key: Tensor, value: Tensor, plan: Plan, call: Call) -> Tensor:
    """(R, H, T, D), (R, K, T, D), (R, K, T, E) to (R, T, H, E)."""
    size = value.shape[-1]
    short = query.shape[-1] - size
    if short:  # the kernel wants one size
        value = F.pad(value, (0, max(short, 0)))
        query, key = (F.pad(t, (0, max(-short, 0))) for t in (query, key))
    out: Tensor = _Flash.apply(query, key, value, call.sinks, plan, call)
    return out[..., :size].contiguous() if short else out


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        plan: Plan,
        call: Call,
    ) -> Tensor:
        rows, heads, width, size = query.shape
        out = query.new_empty(rows, width, heads, size)
        sums = []
        for work in _works(query, key, value, plan):
            found, lse = _whole(work, call, sinks)
            work.put(out, found)
            sums.append(lse)
        ctx.save_for_backward(query, key, value, sinks, out, *sums)
        ctx.plan, ctx.call = plan, call
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, sinks, out, *sums = ctx.saved_tensors
        once = ctx.plan.once and ctx.call.window is None
        make = torch.empty if once else torch.zeros
        # Tokens before heads, as a model has them.
        grads = [make(t.transpose(1, 2).shape, dtype=t.dtype) for t in (query, key, value)]
        sunk = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for work, lse in zip(_works(query, key, value, ctx.plan), sums, strict=True):
            g, o = work.get(grad), work.get(out)
            for part in work.parts(ctx.call):
                (i0, i1), (k0, k1), causal, mask = part
                found = _backward(
                    g[:, :, i0:i1], work.q[:, :, i0:i1], work.keys(k0, k1), work.values(k0, k1),
                    o[:, :, i0:i1], lse[:, :, i0:i1], 0.0, causal,
                    attn_mask=mask, scale=ctx.call.scale,
                )  # fmt: skip
                work.add(grads, found, (i0, i1), (k0, k1), once)
            if sunk is not None:
                sink = _per_head(sinks, work.q)
                weight = torch.exp(sink - lse) * (g.float() * o.float()).sum(-1)
                sunk -= weight.sum(-1).view(-1, sunk.numel()).sum(0)
        dq, dk, dv = (t.transpose(1, 2) for t in grads)
        return dq, dk, dv, sunk if sunk is None else sunk.to(sinks.dtype), None, None


def _whole(work: Any, call: Call, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Results and sums of one piece of work, its parts put together."""
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    spans = []
    for (i0, i1), (k0, k1), causal, mask in work.parts(call):
        found, lse = _forward(
            work.q[:, :, i0:i1], work.keys(k0, k1), work.values(k0, k1), 0.0, causal,
            attn_mask=mask, scale=call.scale,
        )  # fmt: skip
        outs.append(found)
        sums.append(lse)
        spans.append((i0, i1))
    if len(outs) == 1:
        out, lse = outs[0], sums[0]
    elif spans[0] == spans[1]:  # a prefix and the segment's own keys, for the same queries
        lse = torch.logaddexp(*sums)
        weights = [torch.exp(s - lse)[..., None] for s in sums]
        out = sum(w * o for w, o in zip(weights, outs, strict=True)).to(outs[0].dtype)  # type: ignore[union-attr]
    else:
        out, lse = torch.cat(outs, 2), torch.cat(sums, 2)
    if sinks is None:
        return out, lse
    sink = _per_head(sinks, work.q)
    return (out * torch.sigmoid(lse - sink)[..., None]).to(out.dtype), torch.logaddexp(lse, sink)


def _per_head(sinks: Tensor, query: Tensor) -> Tensor:
    """(H,) as (X, g, 1): the heads of one key head after those of another, for each batch."""
    X, g = query.shape[:2]
    return sinks.float().view(-1, g).repeat(X * g // sinks.numel(), 1)[..., None]


def _works(query: Tensor, key: Tensor, value: Tensor, plan: Plan) -> Iterator[Any]:
    for piece in plan.alone:
        yield _Alone(query, key, value, piece)
    for group in plan.groups:
        yield _Group(query, key, value, group)


class _Alone:
    """A segment by itself: views of what is given, and of its prefix."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, piece: tuple[int, int, int, int, int]
    ) -> None:
        self.row, self.p, q, self.a, self.b = piece
        self.before, self.n = q - self.p, self.b - self.a
        self.key, self.value = key, value
        heads, self.K, size = query.shape[1], key.shape[1], query.shape[3]
        self.shape = (self.K, heads // self.K, self.n, size)
        self.q = query[self.row, :, self.a : self.b].view(self.shape)

    def parts(self, call: Call) -> Iterator[Any]:
        """Queries, keys, whether causal, mask. Keys count from the first of the prefix."""
        n, before = self.n, self.before
        if call.window is None or call.window >= n + before:
            if before:
                yield (0, n), (0, before), False, None
            yield (0, n), (before, before + n), True, None
        else:
            yield from blocks(n, before, call.window, self.q)

    def _take(self, x: Tensor, k0: int, k1: int) -> Tensor:
        spans = list(self._spans(k0, k1))
        parts = [x[self.row, :, None, a:b] for a, b, _ in spans]
        found = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return found.expand(-1, self.shape[1], -1, -1)

    def _spans(self, k0: int, k1: int) -> Iterator[tuple[int, int, int]]:
        """Slots of keys k0 to k1, of the prefix and of the segment, and their place among them."""
        before = self.before
        if k0 < before:
            yield self.p + k0, self.p + min(k1, before), 0
        if k1 > before:
            start = max(k0, before)
            yield self.a + start - before, self.a + k1 - before, start - k0

    def keys(self, k0: int, k1: int) -> Tensor:
        return self._take(self.key, k0, k1)

    def values(self, k0: int, k1: int) -> Tensor:
        return self._take(self.value, k0, k1)

    def get(self, x: Tensor) -> Tensor:
        """(R, T, H, D) as (K, g, n, D)."""
        K, g, n, size = self.shape
        return x[self.row, self.a : self.b].view(n, K, g, size).permute(1, 2, 0, 3)

    def put(self, out: Tensor, found: Tensor) -> None:
        self.get(out).copy_(found)

    def add(self, grads: list[Tensor], found: Any, queries: Span, keys: Span, once: bool) -> None:
        """Adds gradients of ``queries`` and ``keys``; ``once``: they are all that there is."""
        write = Tensor.copy_ if once else Tensor.add_
        write(self.get(grads[0])[:, :, queries[0] : queries[1]], found[0])
        for total, grad in zip(grads[1:], found[1:], strict=True):
            many = (grad.sum(1) if self.shape[1] > 1 else grad[:, 0]).transpose(0, 1)
            for a, b, at in self._spans(*keys):
                write(total[self.row, a:b], many[at : at + b - a])


class _Group:
    """Segments of like length at once: gathered, and filled up behind their ends, where no query
    of theirs looks.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, group: Group) -> None:
        self.slots, self.own = group
        self.K = key.shape[1]
        self.g = query.shape[1] // self.K
        self.q, self.k, self.v = (self.get(t.transpose(1, 2), False) for t in (query, key, value))

    def parts(self, call: Call) -> Iterator[Any]:
        n = self.q.shape[2]
        if call.window is None or call.window >= n:
            yield (0, n), (0, n), True, None
        else:
            yield from blocks(n, 0, call.window, self.q)

    def keys(self, k0: int, k1: int) -> Tensor:
        return self.k[:, :, k0:k1].expand(-1, self.g, -1, -1)

    def values(self, k0: int, k1: int) -> Tensor:
        return self.v[:, :, k0:k1].expand(-1, self.g, -1, -1)

    def get(self, x: Tensor, only_own: bool = True) -> Tensor:
        """(R, T, H, D) as (X, g, n, D), X the segments times K; ``only_own``: zeros for what is
        there a second time, as a prefix or to fill up.
        """
        flat = x.flatten(0, 1).index_select(0, self.slots.flatten())
        many = flat.unflatten(0, self.slots.shape)
        if only_own:
            many = many * self.own[..., None, None]
        heads = many.unflatten(2, (self.K, -1))
        return heads.permute(0, 2, 3, 1, 4).flatten(0, 1)

    def _flat(self, found: Tensor) -> Tensor:
        """(X, g, n, D) as (slots, H, D)."""
        heads = found.unflatten(0, (-1, self.K))
        return heads.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)

    def put(self, out: Tensor, found: Tensor) -> None:
        own = self.own.flatten()
        out.view(-1, *out.shape[2:])[self.slots.flatten()[own]] = self._flat(found)[own]

    def add(self, grads: list[Tensor], found: Any, queries: Span, keys: Span, once: bool) -> None:
        spans = (queries, keys, keys)
        for total, grad, (a, b) in zip(grads, found, spans, strict=True):
            many = grad if total is grads[0] else grad.sum(1, keepdim=True)
            slots = self.slots[:, a:b].flatten()
            total.view(-1, *total.shape[2:]).index_add_(0, slots, self._flat(many))
