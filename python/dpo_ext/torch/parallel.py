"""Log-probs over several processes: the vocabulary or the context in parts.

Letters: R rows of logits, V_local columns of this rank's shard, M tokens, S sequences. Vocabulary
parallel: each rank holds columns [vocab_start, vocab_start + V_local) of the same rows and ends
with the same log-probs. Context parallel: each rank holds other rows of the same sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable
from dpo_ext.torch.logps import ops
from dpo_ext.torch.logps.head import Rows
from dpo_ext.torch.logps.logits import sequence_logps
from dpo_ext.torch.logps.scores import (
    Transform,
    check_is_table,
    check_table,
    is_dtensor,
    sum_sequences,
)
from dpo_ext.torch.logps.twin import transform
from dpo_ext.torch.numbers import as_number
from dpo_ext.torch.once import differentiable_once, node, one_by_one

_SUMS = "sums over ranks can be differentiated once, not twice"


def vocab_parallel_sequence_logps(
    logits: Tensor,
    table: ScoreTable,
    *,
    vocab_start: int,
    group: Any = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-prob of each sequence from logits whose columns are spread over the ranks of a group.

    Same as ``sequence_logps(torch.cat(shards of all ranks, -1), table, ...)`` on every rank, while
    no rank holds more than its shard. With ``m_i, S_i`` of the shards and ``M = max m_i``::

        S = sum_i exp(m_i - M) * S_i        logp = (y_t - M) - log S

    One MAX and one SUM all-reduce of (M,) and (3, M) float32 forward, none backward: the gradient
    of a shard needs M and S alone. Every rank must compute the same loss from the result. Hidden
    states that enter each rank's product want `all_reduce_gradient`.

    Args:
        logits: (R, V_local) or (B, T, V_local); float32, bfloat16 or float16. Shards may be uneven,
            and one may be empty.
        table: the same on every rank, with global token ids.
        vocab_start: first global column of this rank's shard, >= 0.
        group: torch.distributed process group; None = all ranks.
        temperature, softcap, logit_scale: as in `sequence_logps`.

    Returns:
        (n_groups, group_size) float32, the same on every rank, differentiable once.

    Raises:
        TensorError: shape, dtype or device; ``logits`` is a DTensor (pass its ``.to_local()``), or
            of another (rows, T) than the table.
        ValueError: ``vocab_start`` < 0 or a scalar out of its range.

    Numerics: as `sequence_logps`; the target's own term is kept apart from the sum on its rank, so
    that ``1 - p`` keeps its digits. A target that no rank holds gives NaN.

    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> table = ScoreTable.from_labels(torch.tensor([[-100, 1], [-100, 3]]))
    >>> vocab_parallel_sequence_logps(torch.zeros(2, 2, 4), table, vocab_start=0)
    tensor([[-1.3863, -1.3863]])
    >>> dist.destroy_process_group()
    """
    how = Transform.of(logit_scale, softcap, temperature)
    check_is_table(table)
    vocab_start = as_number("vocab_start", vocab_start)
    if not isinstance(vocab_start, int):
        raise TypeError(f"`vocab_start` must be an int, found {type(vocab_start).__name__}")
    if vocab_start < 0:
        raise ValueError(f"`vocab_start` must be at least 0, found {vocab_start}")
    rows = _rows_of(logits)
    check_table(table, logits, "logits")
    scored = table.without_zero_weights()
    shard = _Shard(how, vocab_start, group)
    logps, *_ = node(_VocabParallel, rows, scored.logit_rows, scored.targets, shard)
    return sum_sequences(logps, table, kernels=True)


def _rows_of(logits: Tensor) -> Tensor:
    """(R, V_local) view, as the kernels want it."""
    if is_dtensor(logits):
        raise TensorError(
            "`logits` must be a plain tensor, found a DTensor\n"
            "hint: pass logits.to_local() and the first column of this shard as `vocab_start`"
        )
    if logits.dim() not in (2, 3):
        raise TensorError(
            f"`logits` must have shape (R, V) or (B, T, V), found {tuple(logits.shape)}"
        )
    if logits.dtype not in ops.DTYPES:
        accepted = ", ".join(ops.DTYPES.values())
        raise TensorError(f"`logits` must be {accepted}, found {describe(logits.dtype)}")
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    return rows if rows.is_contiguous() else rows.contiguous()


class _Shard(NamedTuple):
    """The columns of a rank, from ``start`` on, and the ranks that hold the others."""

    how: Transform
    start: int
    group: Any


class _VocabParallel(torch.autograd.Function):
    """Log-probs (M,) of tokens whose logits are spread over ranks by columns."""

    @staticmethod
    def forward(
        logits: Tensor, logit_rows: Tensor, targets: Tensor, shard: _Shard
    ) -> tuple[Tensor, ...]:
        """The log-probs, and what the gradient of the shard needs."""
        how, vocab_start, group = shard
        (R, V), M = logits.shape, targets.shape[0]
        rows = Rows.of(logit_rows, targets, R)
        scored = targets != IGNORE_INDEX
        exists = rows.place < R
        mine = exists & (targets >= vocab_start) & (targets < vocab_start + V)
        # Whoever does not hold the target folds as if it were column 0, and puts that back.
        local = torch.where(mine, targets - vocab_start, 0)
        local = torch.where(exists, local, IGNORE_INDEX).to(torch.int32)
        if V:
            _, m, rest, *_ = ops.token_stats(logits, logit_rows, local, how, False)
            y = _at(logits, rows, local, how)
        else:
            m, rest, y = logits.new_zeros(3, M, dtype=torch.float32)
            m = torch.full_like(m, -torch.inf)
        top = torch.where(exists, m, 0.0)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        nothing = m == -torch.inf  # an empty or wholly masked shard adds nothing
        own = torch.where(nothing, 0.0, torch.exp(y - m))
        factor = torch.exp(m - top)
        part = torch.where(nothing, 0.0, rest + torch.where(mine, 0.0, own)) * factor
        parts = torch.stack([part, torch.where(mine, y - top, 0.0), mine.float()])
        dist.all_reduce(parts, group=group)
        others, shifted, holders = parts
        total = others + torch.exp(shifted)
        logps = torch.where(shifted == 0, -torch.log1p(others), shifted - torch.log(total))
        logps = torch.where(exists & (holders == 1), logps, torch.nan)
        # In backward the kernel adds the term of its target to what it is given.
        given = torch.where(mine, others, total - torch.exp(y - top))
        logps = torch.where(scored, logps, 0.0)
        # torch.func saves no input that is an output too
        place = rows.place.clone() if rows.whole else rows.place
        return logps, local, place, mine, top, given, total, y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> Any:
        logits, logit_rows, _, shard = inputs
        ctx.how, ctx.height = shard.how, logits.shape[0]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, logit_rows, *output[1:])
        return output[:1]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 4
        logits, logit_rows, local, place, mine, top, given, total, y = ctx.saved_tensors

        def gradient(g: Tensor) -> tuple[Tensor]:
            if not logits.shape[1]:
                return (torch.zeros_like(logits),)
            g = g.contiguous()
            dz = ops.logits_grad(logits, logit_rows, local, top, given, g, *ctx.how)
            # Column 0 of rows whose target is elsewhere: there is no onehot here.
            p = torch.exp(y - top) / total
            rows = Rows(place, local, ctx.height)
            zero = torch.zeros_like(local)
            fix = torch.where(g != 0, -g * p * _slope(_pick(logits, rows, zero), ctx.how), 0.0)
            column = torch.cat([dz[:, 0], dz.new_zeros(1)])
            column.index_copy_(0, torch.where(mine, ctx.height, place), fix.to(dz.dtype))
            dz[:, 0] = column[: ctx.height]
            return (dz,)

        with torch.no_grad():
            (dz,) = one_by_one(gradient, g)
        return (differentiable_once(dz, g), None, None, None)


def _pick(logits: Tensor, rows: Rows, columns: Tensor) -> Tensor:
    """(M,) raw logits in float32; 0 where there is no row."""
    if not rows.height:
        return logits.new_zeros(columns.shape[0], dtype=torch.float32)
    z = logits[rows.place.clamp(max=rows.height - 1), columns.clamp(min=0).long()].float()
    return torch.where(rows.place < rows.height, z, 0.0)


def _at(logits: Tensor, rows: Rows, columns: Tensor, how: Transform) -> Tensor:
    """(M,) transformed logits in float32."""
    return transform(_pick(logits, rows, columns), *how)


def _slope(z: Tensor, how: Transform) -> Tensor:
    """dy/dz of the transform."""
    slope = torch.full_like(z, how.logit_scale / how.temperature)
    if how.softcap:
        t = torch.tanh(how.logit_scale * z / how.softcap)
        slope = slope * (1 - t) * (1 + t)
    return slope


def all_reduce_gradient(hidden: Tensor, group: Any = None) -> Tensor:
    """The same tensor, whose gradient is summed over the ranks of a group.

    For hidden states that all ranks share and multiply by their own shard of the head: each shard's
    product gives one part of their gradient.

    Args:
        hidden: any shape, the same on every rank.
        group: torch.distributed process group; None = all ranks.

    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> hidden = torch.ones(2, requires_grad=True)
    >>> (3 * all_reduce_gradient(hidden)).sum().backward()
    >>> hidden.grad
    tensor([3., 3.])
    >>> dist.destroy_process_group()
    """
    made: Tensor = node(_AllReduceGradient, hidden, group)
    return made


class _AllReduceGradient(torch.autograd.Function):
    ONCE = _SUMS

    @staticmethod
    def forward(hidden: Tensor, group: Any) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        def total(g: Tensor) -> tuple[Tensor]:
            g = g.contiguous().clone()
            dist.all_reduce(g, group=ctx.group)
            return (g,)

        with torch.no_grad():
            (made,) = one_by_one(total, g)
        return differentiable_once(made, g, _SUMS), None


def context_parallel_table(table: ScoreTable, rows: Tensor) -> ScoreTable:
    """The part of a table that this rank's rows of logits can score.

    Same as keeping the tokens whose ``logit_rows`` is in ``rows``, renumbered by its place there;
    the others stay in the table as not scored, so that the size is static and nothing waits for the
    device. All ranks' parts together score each token once, in any split of the positions.

    Args:
        table: of the whole batch, the same on every rank.
        rows: (R_local,) int64, global row of each local row; no row twice, none on two ranks.

    Returns:
        ScoreTable for the local logits, of which it knows the number of rows, with the sequences of
        the whole batch.

    Raises:
        TensorError: dtype, shape or device of ``rows``.

    >>> table = ScoreTable(logit_rows=[4, 5, 6], targets=[7, 8, 9], seq_offsets=[0, 2, 3])
    >>> context_parallel_table(table, torch.tensor([5, 6, 7]))
    ScoreTable(n_groups=1, group_size=2, n_tokens=3, device=cpu)
      sequence 0 (group 0): row 0 not scored, row 0 -> 8
      sequence 1 (group 0): row 1 -> 9
    """
    check_is_table(table)
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise TensorError(f"`rows` must be int64 of shape (R_local,), found {describe(rows)}")
    if rows.device != table.device:
        raise TensorError(f"`rows` must be on {table.device}, found {rows.device}")
    order = rows.argsort()
    sorted_rows = rows[order]
    place = torch.searchsorted(sorted_rows, table.logit_rows)
    inside = place < rows.shape[0]
    place = place.clamp(max=max(rows.shape[0] - 1, 0))
    if rows.shape[0]:
        inside &= sorted_rows[place] == table.logit_rows
        local = torch.where(inside, order[place], 0)
    else:
        local = torch.zeros_like(table.logit_rows)
    targets = table.targets.masked_fill(~inside, IGNORE_INDEX)
    return table.with_rows(local, targets, (rows.shape[0],))


def context_parallel_sequence_logps(
    logits: Tensor, table: ScoreTable, *, group: Any = None, **options: Any
) -> Tensor:
    """Log-prob of each sequence whose tokens are spread over the ranks of a group.

    Same as the sum over ranks of ``sequence_logps(logits, table, **options)``: one differentiable
    all-reduce of (S,) float64. Its backward pass adds the upstream gradients of all ranks, so that
    averaging parameter gradients over the ranks, as DDP and FSDP do, gives those of the mean of the
    ranks' losses, which are one loss.

    Args:
        logits: (R_local, V) or (B, T_local, V), this rank's rows.
        table: `context_parallel_table` of this rank: the same sequences on every rank.
        group: torch.distributed process group; None = all ranks.
        **options: as in `sequence_logps`.

    Returns:
        (n_groups, group_size), the same on every rank.

    Raises:
        As `sequence_logps`.

    Numerics: each rank's sums are float32 of float64; they are added in float64.

    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> table = ScoreTable.from_labels(torch.tensor([[-100, 1], [-100, 3]]))
    >>> context_parallel_sequence_logps(torch.zeros(2, 2, 4), table)
    tensor([[-1.3863, -1.3863]])
    >>> dist.destroy_process_group()
    """
    total: Tensor = node(_AllReduce, sequence_logps(logits, table, **options), group)
    return total


class _AllReduce(torch.autograd.Function):
    """Sum over ranks, added in float64; backward is the same sum of the upstream gradients."""

    ONCE = _SUMS

    @staticmethod
    def forward(values: Tensor, group: Any) -> Tensor:
        return _summed(values, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            (total,) = one_by_one(lambda g: (_summed(g, ctx.group),), g)
        return differentiable_once(total, g, _SUMS), None


def _summed(values: Tensor, group: Any) -> Tensor:
    total = values.to(torch.float64, copy=True).contiguous()
    dist.all_reduce(total, group=group)
    return total.to(values.dtype)
