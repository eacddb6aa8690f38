"""The parts that every plan of the linear head is made of: rows, chunks, fold and gradient.

Letters: R rows of hidden states, H hidden, V vocabulary, M tokens of the table, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable
from dpo_ext.torch.logps import ops, twin
from dpo_ext.torch.logps.lowrank import LowRank
from dpo_ext.torch.logps.products import logits_into, part, product, wide
from dpo_ext.torch.logps.scores import Impl, Transform, check_table, is_dtensor, uses_kernels
from dpo_ext.torch.logps.scratch import lent
from dpo_ext.torch.numbers import as_number, host_values

SCRATCH_BYTES = 1_100_000_000
"""Default bound of one chunk of logits: 4096 rows of 128k bfloat16."""
EXACT_ROWS = 512
"""Rows whose exact target logits are computed at a time: 8 MB of float32 at H = 4096."""
Exact = Tensor | None
Folded = tuple[list[Tensor], list[Tensor]]
"""Values of each row, and what is kept for their gradient."""
_NO_ROW = -1  # target of a token whose row does not exist: the fold answers NaN


class Linear(NamedTuple):
    """A head and the hidden states that it multiplies, checked."""

    hidden: Tensor
    """(R, H)"""
    weight: Tensor
    """(V, H)"""
    bias: Tensor | None
    """(V,)"""

    @staticmethod
    def of(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: ScoreTable,
        *,
        called: str = "hidden",
        reads_targets: bool = True,
    ) -> Linear:
        """Compares everything's shape, dtype and device; ``hidden``, which the caller knows as
        ``called``, may be (B, T, H). Where no target's column is read, ids may be of any
        vocabulary.
        """
        for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if not isinstance(value, Tensor) and not (name == "bias" and value is None):
                raise TypeError(f"`{name}` must be a torch.Tensor, found {describe(value)}")
            if is_dtensor(value):
                raise TensorError(
                    f"`{name}` must be a plain tensor, found a DTensor\n"
                    "hint: score inside the wrapped model: model = wrap(attach_scoring(model))"
                )
        if hidden.dim() not in (2, 3):
            raise TensorError(
                f"`hidden` must have shape (R, H) or (B, T, H), found {tuple(hidden.shape)}"
            )
        if hidden.is_meta:
            raise TensorError("`hidden` must hold values, found a tensor on the meta device")
        rows = hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() == 3 else hidden
        H = rows.shape[1]
        if weight.dim() != 2 or weight.shape[1] != H:
            raise TensorError(f"`weight` must have shape (V, {H}), found {tuple(weight.shape)}")
        V = weight.shape[0]
        if bias is not None and tuple(bias.shape) != (V,):
            raise TensorError(f"`bias` must have shape ({V},), found {tuple(bias.shape)}")
        autocast = torch.is_autocast_enabled(hidden.device.type)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            if value.device != hidden.device:
                raise TensorError(f"`{name}` must be on {hidden.device}, found {value.device}")
            if value.dtype != hidden.dtype and not autocast:
                ours, theirs = describe(hidden.dtype), describe(value.dtype)
                raise TensorError(f"`{name}` must be {ours}, as `hidden` is, found {theirs}")
        check_table(table, hidden, called, V if reads_targets else None)
        return Linear(rows, weight, bias)

    def trains(self) -> bool:
        """Whether anything here gets a gradient."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self)

    def detached(self) -> Linear:
        bias = None if self.bias is None else self.bias.detach()
        return Linear(self.hidden.detach(), self.weight.detach(), bias)


class HeadOptions(NamedTuple):
    """What a caller says of the head; `Head.of` checks it."""

    transform: Transform
    impl: Impl = "auto"
    chunk_rows: int | None = None
    exact_target: bool = False


def check_chunk_rows(chunk_rows: int | None, row_bytes: int, budget: int) -> int:
    """Rows of a chunk; by default as many as the budget holds, a multiple of 256 if it can be."""
    if chunk_rows is None:
        fit = budget // max(row_bytes, 1)
        return max(fit // 256 * 256 or fit, 1)
    rows = as_number("chunk_rows", chunk_rows)
    if not isinstance(rows, int):
        raise TypeError(f"`chunk_rows` must be an int or None, found {describe(chunk_rows)}")
    if rows < 1:
        raise ValueError(f"`chunk_rows` must be at least 1, found {rows}")
    return rows


def row_width(vocabulary: int, device: torch.device) -> int:
    """Elements from one row of scratch to the next: on a GPU a multiple of 64, so that every row of
    an odd vocabulary (GPT-2: 50,257) begins where 16 bytes can be loaded, by us and by cuBLAS. A
    compiled graph takes no ``out=`` with gaps between its rows.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return vocabulary
    return -(-vocabulary // 64) * 64


class Head(NamedTuple):
    """How one call computes: what does not change from chunk to chunk."""

    how: Transform
    kernels: bool
    dtype: torch.dtype
    """Of the products: that of ``hidden``, or autocast's."""
    chunk_rows: int
    exact_target: bool = False
    """Whether the target's logit is a product of its own, not rounded to ``dtype``."""

    @staticmethod
    def of(linear: Linear, options: HeadOptions) -> Head:
        """The dtype of the products, kernels or twin, and the size of a chunk."""
        rows = linear.hidden
        if not isinstance(options.exact_target, bool):
            found = describe(options.exact_target)
            raise TypeError(f"`exact_target` must be a bool, found {found}")
        if not rows.is_floating_point():
            found = describe(rows.dtype)
            raise TensorError(f"`hidden` must have a floating-point dtype, found {found}")
        dtype, where = rows.dtype, rows.device.type
        if torch.is_autocast_enabled(where) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(where)
        kernels = uses_kernels(dtype, where, options.impl, "hidden")
        row_bytes = linear.weight.shape[0] * dtype.itemsize
        chunk_rows = check_chunk_rows(options.chunk_rows, row_bytes, SCRATCH_BYTES)
        return Head(options.transform, kernels, dtype, chunk_rows, options.exact_target)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """At least one, which is empty where there is no token."""
        if tokens <= self.chunk_rows:  # no loop: torch.compile has one graph for all these numbers
            yield slice(0, tokens)
            return
        for start in range(0, tokens, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, tokens))

    def scratch(self, weight: Tensor, tokens: int) -> Tensor:
        """(C, V) that every chunk's logits are written into."""
        rows, V = min(self.chunk_rows, tokens), weight.shape[0]
        width = row_width(V, weight.device)
        whole = lent((rows, width), self.dtype, weight.device)
        return whole if width == V else whole[:, :V]

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
        return logits_into(part(scratch, slice(0, x.shape[0])), x, weight, bias)

    def exact(self, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Exact:
        """(C,) logits of the targets, added and kept in float32, or None if not asked for."""
        if not self.exact_target:
            return None
        V, sums = weight.shape[0], wide(self.dtype)
        if not V:
            return x.new_zeros(len(x), dtype=sums)
        column = targets.clamp(0, V - 1).long()
        parts = [
            (a.to(sums) * weight[t].to(sums)).sum(1)
            for a, t in zip(x.split(EXACT_ROWS), column.split(EXACT_ROWS), strict=True)
        ]
        y = torch.cat(parts)
        return y if bias is None else y + bias[column]

    def fold(
        self,
        z: Tensor,
        targets: Tensor,
        stats: bool,
        exact: Exact = None,
        sums: ops.Sums = ops.NO_SUMS,
    ) -> Folded:
        """Log-probs and, if asked for, statistics of each row, and what `gradient` needs. The
        kernels give ``sums`` over sequences in place of log-probs, where no target is exact.
        """
        if self.kernels:
            out = ops.token_stats(z, None, targets, self.how, stats, sums)
            values, state = [out[0], *(out[3:] if stats else ())], [out[1], out[2]]
            if exact is not None:
                values[0], factor = self._replace_target(z, targets, values[0], state, exact)
                state.append(factor)
            return values, state
        rows = torch.arange(z.shape[0], device=z.device)
        values = list(twin.token_stats(z, rows, targets, *self.how, stats)[: 5 if stats else 1])
        if exact is not None:
            replaced = self._with_target(z, targets, exact)
            values[0] = twin.token_stats(replaced, rows, targets, *self.how, False)[0]
            return values, [exact]
        return values, []

    def gradient(self, z: Tensor, targets: Tensor, kept: list[Tensor], g: Tensor) -> Tensor:
        """dz; the kernels write it over z."""
        if self.kernels:
            if self.exact_target:
                *kept, factor = kept
                g = torch.where(g != 0, g * factor, 0.0)
            ops.logits_grad_(z, None, targets, *kept, g, *self.how)
            return z
        rows = torch.arange(z.shape[0], device=z.device)
        leaf = self._with_target(z, targets, kept[0]) if self.exact_target else z
        with torch.enable_grad():
            leaf = leaf.detach().requires_grad_()
            logps = twin.token_stats(leaf, rows, targets, *self.how, False)[0]
            (dz,) = torch.autograd.grad(logps, leaf, g.to(logps.dtype))
        return torch.where(g[:, None] != 0, dz, 0.0).to(z.dtype)  # as the kernels: 0 of NaN is 0

    def unit_gradient(self) -> float:
        """A power of 2 in place of a gradient of 1: in float16 one that takes dz to the top of its
        range, where the small probabilities of a row are not lost.
        """
        if self.dtype != torch.float16:
            return 1.0
        return 2.0 ** (math.frexp(65504 / (self.how.logit_scale / self.how.temperature))[1] - 1)

    def _with_target(self, z: Tensor, targets: Tensor, exact: Tensor) -> Tensor:
        column = targets.clamp(0, z.shape[1] - 1).long()[:, None]
        return z.to(exact.dtype).scatter(1, column, exact[:, None])

    def _replace_target(
        self, z: Tensor, targets: Tensor, logps: Tensor, state: list[Tensor], exact: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probs with another logit of the target, and the factor of g for their gradient.

        With ``rest`` the sum without the target and ``e = exp(y_t - m)``, every element of dz has
        the factor ``1 / (rest + e)`` and none but the target's another place for y_t: a g times
        ``(rest + e_rounded) / (rest + e_exact)`` is all that the kernel must be given.
        """
        V = z.shape[1]
        if not V or not len(targets):
            return logps, torch.ones_like(logps)
        rounded = z.gather(1, targets.clamp(0, V - 1).long()[:, None])[:, 0]
        largest, rest = (part.double() for part in state)
        d, d_rounded = (twin.transform(y.double(), *self.how) - largest for y in (exact, rounded))
        total = rest + d.exp()
        # -log1p keeps the digits of a target that is nearly certain, and log those of another
        value = torch.where(d > -1.0, -torch.log1p(rest * torch.exp(-d)), d - total.log())
        valid = (targets >= 0) & (targets < V)
        factor = (rest + d_rounded.exp()) / total
        return torch.where(valid, value.to(logps.dtype), logps), factor.to(logps.dtype)


class Rows(NamedTuple):
    """The rows of a table within hidden states (R, H); nothing here waits for the device."""

    place: Tensor
    """(M,) int64, the token's row; R for a token that is not scored or whose row does not exist."""
    targets: Tensor
    """(M,) int32; outside [0, V) where the row does not exist, so that its log-prob is NaN."""
    height: int
    whole: bool = False
    """Whether every token is scored and its row exists, which the host may know."""

    @staticmethod
    def of(logit_rows: Tensor, targets: Tensor, height: int) -> Rows:
        """Of a table that `check_table` found to fit."""
        if targets.shape[0] and host_values(targets) and int(targets.min()) >= 0:
            return Rows(logit_rows, targets, height, True)
        scored = targets != IGNORE_INDEX
        exists = (logit_rows >= 0) & (logit_rows < height)
        here = scored & exists
        place = torch.where(here, logit_rows, height)
        return Rows(place, targets.masked_fill(scored ^ here, _NO_ROW), height)

    def gather(self, hidden: Tensor, chunk: slice, dtype: torch.dtype) -> Tensor:
        """(C, H): zeros where there is no row, whatever lies in the rows that are not scored."""
        place = part(self.place, chunk)
        if self.whole:
            return hidden.index_select(0, place).to(dtype)
        missing = (place == self.height)[:, None]
        if not self.height:
            return hidden.new_zeros(place.shape[0], hidden.shape[1], dtype=dtype)
        x = hidden.index_select(0, place.clamp(max=self.height - 1))
        return x.to(dtype).masked_fill_(missing, 0)

    def new_gradient(self, like: Tensor) -> Tensor:
        """(R+1, H) zeros; the spare last row takes what belongs nowhere."""
        return like.new_zeros(self.height + 1, like.shape[1])


class Work(NamedTuple):
    """A head at work: its operands in the dtype of the products, and the scratch of one chunk."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Rows
    head: Head
    scratch: Tensor
    low: LowRank | None = None
    base: Tensor | None = None
    """(C, V) scratch for the product with the weight, which the gradient of ``low.columns`` needs.
    """

    @staticmethod
    def of(
        linear: Linear,
        rows: Rows,
        head: Head,
        scratch: Tensor | None = None,
        low: LowRank | None = None,
        keeps_base: bool = False,
    ) -> Work:
        """With a scratch of its own, or one that an earlier pass left."""
        weight = linear.weight.to(head.dtype)
        bias = None if linear.bias is None else linear.bias.to(head.dtype)
        if scratch is None:
            scratch = head.scratch(weight, rows.targets.shape[0])
        base = head.scratch(weight, rows.targets.shape[0]) if keeps_base else None
        return Work(linear.hidden, weight, bias, rows, head, scratch, low, base)

    def gather(self, chunk: slice) -> Tensor:
        """(C, H) hidden states."""
        return self.rows.gather(self.hidden, chunk, self.head.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """(C, V), in the scratch."""
        z = self.head.logits(x, self.weight, self._bias, self.scratch)
        if self.low is not None:
            kept = self.kept(z)
            if kept is not None:
                kept.copy_(z)
            self.low.add_to(z, x, self.bias)
        return z

    def kept(self, z: Tensor) -> Tensor | None:
        """The rows of ``base`` that belong to ``z``."""
        return None if self.base is None else part(self.base, slice(0, z.shape[0]))

    @property
    def _bias(self) -> Tensor | None:
        """What is added to the product with the weight: columns are multiplied before the bias."""
        later = self.low is not None and self.low.columns is not None
        return None if later else self.bias

    def back(self, dz: Tensor, du: Tensor | None) -> Tensor:
        """(C, H) gradient of the hidden states; ``du`` is that of what an adapter has between.
        Writes over ``dz`` what belongs to the weight.
        """
        if self.low is None or du is None:
            return product(dz, self.weight)
        self.scale(dz)
        return product(dz, self.weight) + self.low.through(du)

    def scale(self, dz: Tensor) -> None:
        """Makes gradients of logits those of the product with the weight."""
        if self.low is not None and self.low.columns is not None:
            dz.mul_(self.low.columns)

    def fold(
        self, x: Tensor, z: Tensor, chunk: slice, stats: bool, sums: ops.Sums = ops.NO_SUMS
    ) -> Folded:
        """Log-probs and statistics of the chunk's rows, and what their gradient needs."""
        t = part(self.rows.targets, chunk)
        exact = self.head.exact(x, self.weight, self._bias, t)
        if self.low is not None and exact is not None and z.shape[1]:
            exact = self.low.exact(exact, x, self.bias, t.clamp(0, z.shape[1] - 1).long())
        return self.head.fold(z, t, stats, exact, sums)
