"""Head and loss in one: with the reference known, a chunk of whole pairs knows its gradient.

Letters: N pairs, M tokens of the table, R rows of hidden states, H hidden, V vocabulary. ``c`` =
dL/d(log-prob of a sequence), a function of the pair's own log-probs. One pass over the chunks:
logits, fold, sums, c, dz, dX, dW: 6MHV, where folding first and recomputing costs 8MHV. A pair
that is longer than a chunk is folded piece by piece and then run again: 8MHV for that pair alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch.logps import ops, twin
from dpo_ext.torch.logps.head import Folded, Head, HeadOptions, Linear, Rows, Work
from dpo_ext.torch.logps.linear import check_adapter, choose_plan, linear_sequence_logps
from dpo_ext.torch.logps.lowrank import NOTHING, LowRank, LowRankSums
from dpo_ext.torch.logps.products import add_product, joined, new_sum, room, times, wide
from dpo_ext.torch.logps.scores import (
    Impl,
    Transform,
    check_is_table,
    check_plain,
    token_grad,
    without_autocast,
)
from dpo_ext.torch.losses.checks import convert_parameter
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.losses.forms import over
from dpo_ext.torch.losses.inputs import Inputs
from dpo_ext.torch.losses.node import Bound, Pairs, slopes_of, weighted_sum
from dpo_ext.torch.losses.pairs import SCALE, PreferenceLoss, bind_terms, preference_loss
from dpo_ext.torch.losses.ranks import check_group, count_pairs
from dpo_ext.torch.numbers import as_number, host_values, transformed
from dpo_ext.torch.once import differentiable_once

Plan = Literal["auto", "frozen", "pairwise", "recompute"]
PLANS: tuple[Plan, ...] = get_args(Plan)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    table: ScoreTable,
    ref_logps: Tensor | None = None,
    *,
    loss: Any = "dpo",
    beta: Any = None,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    lengths: Tensor | None = None,
    pair_weight: Any = None,
    num_pairs: float | Tensor | None = None,
    compat: str | None = None,
    loss_weights: Sequence[float] | None = None,
    group: Any = None,
    plan: Plan = "auto",
    chunk_rows: int | None = None,
    chunk_pairs: int | None = None,
    exact_target: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: Impl = "auto",
    **params: Any,
) -> PreferenceLoss:
    """Preference loss of pairs from hidden states, with the gradient made in the forward pass.

    Same as::

        logps = linear_sequence_logps(hidden, weight, table, bias=bias, ...)
        preference_loss(logps, ref_logps, loss=loss, beta=beta, lengths=table.lengths, ...)

    With the plan ``pairwise`` each chunk of whole pairs turns its log-probs into
    ``c = dL/dlogp`` as soon as they are folded, so that no logits are computed twice; backward
    multiplies what was made by the upstream scalar.

    Args:
        hidden, weight, table, bias, adapter, chunk_rows, exact_target: as in
            `linear_sequence_logps`; ``group_size`` 2.
        chunk_pairs: >= 1, the most pairs of a chunk of ``pairwise``. Inside ``torch.compile``,
            where the table's borders have no values: None makes all pairs one chunk, and a number
            chunks of that many, if all pairs have as many tokens (tables of ``from_labels``); a
            table with others has NaN log-probs there.
        ref_logps: (N, 2) of the frozen reference, cast to the dtype of the log-probs. None only
            for losses without one.
        loss, beta, num_pairs, compat, loss_weights, group, **params: as in `preference_loss`.
        pair_weight: its ``weight``, a factor of each pair, (N,).
        lengths: (N, 2); default for losses by name: ``table.lengths``.
        plan: ``"pairwise"`` (losses by name in which a pair's gradient depends on that pair
            alone), ``"frozen"``, ``"recompute"``, or ``"auto"``: ``frozen`` for a head without
            gradient, else ``pairwise`` if the loss allows it, else ``recompute``.
        temperature, softcap, logit_scale, impl: as in `sequence_logps`.

    Returns:
        PreferenceLoss; ``.plan`` is the plan that was taken (inside transforms of ``torch.func``
        ``recompute`` stands in for ``pairwise``). ``.logps`` are detached, a term of
        ``.differentiable_logps`` can be added to the loss: with ``pairwise`` it makes backward
        compute the logits again, and inside ``torch.compile`` there are none with ``pairwise``
        (None). ``.per_pair`` of ``pairwise`` has no gradient.

    Raises:
        As `linear_sequence_logps` and `preference_loss`. ValueError: ``plan="pairwise"`` for a
        loss that couples the batch, a callable, ``compat``, or a parameter that needs a gradient.

    Numerics: as `linear_sequence_logps`. In float16 the gradients made in the forward pass know
    their size: those of the logits are multiplied by the power of 2 that takes the largest
    coefficient among the chunks to the top of float16's range, those of the hidden states are kept
    over the size of their own coefficient, so that under any loss scale, `num_pairs`, weight and
    margin as much is left as autograd's float16 keeps. A second backward pass through the same loss
    computes them again. What a pair of weight 0 holds is not read, NaN included.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)
    >>> table = ScoreTable.from_labels(torch.tensor([[-100, 1, 2], [-100, 3, -100]]))
    >>> linear_preference_loss(hidden, weight, table, torch.tensor([[-2.0, -2.0]])).loss
    tensor(0.7649)
    """
    check_is_table(table)
    if table.group_size != 2:
        raise TensorError(f"`table` must have groups of 2, found {table.group_size}")
    if ref_logps is not None:
        check_plain("ref_logps", ref_logps)
    chunk_pairs = _check_chunk_pairs(chunk_pairs)
    if plan not in PLANS:
        raise ValueError(f"`plan` must be one of {', '.join(PLANS)}, found {plan!r}")
    own_lengths = lengths is not None
    if lengths is None and _may_read_lengths(loss, compat):
        lengths = table.lengths
    options = {"loss": loss, "num_pairs": num_pairs, "compat": compat, "loss_weights": loss_weights}
    if group is not None:
        if num_pairs is not None:
            raise ValueError(
                "`num_pairs` and `group` both say what the mean is over: pass one of them"
            )
        options["group"] = group
    by_pair = {"beta": beta, "weight": pair_weight, **params}
    why_not = _not_pairwise(loss, compat, [beta, pair_weight, *params.values()])
    if plan == "pairwise" and why_not:
        raise ValueError(f'`plan="pairwise"` needs another loss: {why_not}\nhint: use plan="auto"')
    if plan == "auto":
        plan = choose_plan("auto", weight, bias, adapter)
        if plan == "recompute" and not why_not:
            plan = "pairwise"
    traced = torch.compiler.is_compiling()
    if plan == "pairwise" and not traced and transformed():
        plan = "recompute"  # torch.func differentiates the log-probs, whose gradient it finds there
    if plan != "pairwise":
        logps = linear_sequence_logps(
            hidden,
            weight,
            table,
            bias=bias,
            adapter=adapter,
            plan=plan,
            chunk_rows=chunk_rows,
            exact_target=exact_target,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            impl=impl,
        )
        ref = None if ref_logps is None else ref_logps.to(logps.dtype)
        out = preference_loss(logps, ref, lengths=lengths, **options, **by_pair)
        out.plan, out.differentiable_logps = plan, logps
        return out

    table.check_host_offsets()
    scored = table.without_zero_weights()
    linear = Linear.of(hidden, weight, bias, scored)
    check_adapter(adapter, linear)
    how = Transform.of(logit_scale, softcap, temperature)
    head = Head.of(linear, HeadOptions(how, impl, chunk_rows, exact_target))
    N, ref = table.n_groups, ref_logps
    if ref is not None:
        ref = ref.to(wide(head.dtype))
        if tuple(ref.shape) != (N, 2):
            raise TensorError(f"`ref_logps` must have shape ({N}, 2), found {tuple(ref.shape)}")
    ranks = check_group(options.get("group"))
    if num_pairs is None:
        options.pop("group", None)
        options["num_pairs"] = float(max(N, 1))
        if ranks is not None:
            like = hidden.new_zeros((), dtype=wide(head.dtype))
            options["num_pairs"] = count_pairs(N, like, ranks)
    like = torch.zeros((), dtype=wide(head.dtype), device=hidden.device).expand(N, 2)
    count, group = options["num_pairs"], options.get("group")
    inputs = Inputs(like, ref, lengths, pair_weight, count, group)
    given = params if beta is None else {"beta": beta, **params}
    losses = _Losses.of(inputs, loss, loss_weights, given)
    trained = linear.trains() or (adapter is not None and adapter.trains())
    job = _Job(scored, head, losses, trained, chunk_pairs)
    apply = (_TracedPairwiseHead if traced else _PairwiseHead).apply
    total, logps, per_pair = apply(*linear, *(adapter or NOTHING), job)
    if own_lengths or (host_values(total) and math.isnan(total.item())):  # looks at all values
        preference_loss(logps.detach(), ref, lengths=lengths, **options, **by_pair)
    scale = losses.terms[0][1].params.get("beta")
    if beta is not None and not isinstance(loss, str):
        scale = convert_parameter("beta", beta, SCALE, like)
    out = PreferenceLoss(total, per_pair, logps, ref, scale)
    out.plan = plan
    out.differentiable_logps = None if traced else logps
    return out


def _may_read_lengths(loss: Any, compat: str | None) -> bool:
    """Whether the lengths of the table are worth counting."""
    if compat is not None:
        return isinstance(loss, str) or not callable(loss)
    names = loss if isinstance(loss, (list, tuple)) else [loss]
    return any(isinstance(n, str) and find_loss(n).lengths for n in names)


def _check_chunk_pairs(chunk_pairs: Any) -> int | None:
    if chunk_pairs is None:
        return None
    count = as_number("chunk_pairs", chunk_pairs)
    if not isinstance(count, int):
        raise TypeError(f"`chunk_pairs` must be an int or None, found {describe(chunk_pairs)}")
    if count < 1:
        raise ValueError(f"`chunk_pairs` must be at least 1, found {count}")
    return count


def _not_pairwise(loss: Any, compat: str | None, params: Sequence[Any]) -> str | None:
    """Why a pair's gradient may not be a function of that pair alone, or None."""
    if compat is not None:
        return "`compat` may average over the batch"
    for name in loss if isinstance(loss, (list, tuple)) else [loss]:  # torch 2.8 compiles no unions
        if not isinstance(name, str):
            return "a callable may look at the whole batch"
        row = find_loss(name)
        if row.couples_batch or row.autograd:
            return f"{name!r} couples the pairs of a batch, or may"
    if any(isinstance(p, Tensor) and p.requires_grad for p in params):
        return "a parameter that needs a gradient gets it from the whole batch"
    return None


class _Losses(NamedTuple):
    """The losses of pairs as factors of rows of the table, with what a pair has of its own."""

    terms: tuple[tuple[float, Bound], ...]
    pairs: Pairs

    @staticmethod
    def of(inputs: Inputs, loss: Any, factors: Any, given: dict[str, Any]) -> _Losses:
        terms = bind_terms(inputs, loss, factors, given)
        each = Pairs(inputs.ref_logps, inputs.lengths, inputs.weight, inputs.count, None)
        return _Losses(terms, each)

    def total(self, per_pair: Tensor) -> Tensor:
        """The scalar loss of all pairs."""
        return over(weighted_sum(per_pair, self.pairs.weight), self.pairs.divisor)

    def per_pair(self, logps: Tensor) -> Tensor:
        """(N,) loss of each pair."""
        values = [factor * self.pairs.evaluate(logps, bound)[0] for factor, bound in self.terms]
        return sum(values[1:], values[0])

    def slopes(self, logps: Tensor, pairs: slice) -> Tensor:
        """(n, 2) dL/dlogp of some pairs of the batch."""

        def cut(value: Any) -> Any:
            return value[pairs.start : pairs.stop] if isinstance(value, Tensor) else value

        ref, lengths, weight, divisor, _ = self.pairs
        each = Pairs(cut(ref), cut(lengths), cut(weight), divisor, None)
        parts = [
            factor * slopes_of(logps, each, Bound(row, {k: cut(v) for k, v in params.items()}))
            for factor, (row, params) in self.terms
        ]
        return sum(parts[1:], parts[0])


def chunks_of_pairs(
    offsets: Sequence[int], most: int, most_pairs: int | None = None
) -> Iterator[slice]:
    """Whole pairs whose tokens fit into ``most`` rows, or one pair that does not.

    ``offsets`` (2N+1,) are those of the table, on the host. With ``most_pairs`` a chunk has no more
    pairs than that.

    >>> list(chunks_of_pairs([0, 2, 3, 5, 6, 16, 20], 8))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    borders = offsets[::2]
    start = 0
    for pair in range(1, len(borders)):
        full = borders[pair] - borders[start] > most or pair - start - 1 == most_pairs
        if pair > start + 1 and full:
            yield slice(start, pair - 1)
            start = pair - 1
    if start < len(borders) - 1:
        yield slice(start, len(borders) - 1)


class _Job(NamedTuple):
    """What is computed of a head: which tokens, how, and for which loss."""

    table: ScoreTable
    head: Head
    losses: _Losses
    trained: bool
    chunk_pairs: int | None


class _PairwiseHead(torch.autograd.Function):
    """``(loss, log-probs (N, 2), loss of each pair)``; the loss is differentiable, from gradients
    made in forward, and the log-probs are, by computing their logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        columns: Tensor | None,
        job: _Job,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (hidden, weight, bias, down, up, columns)
        ctx.needed = tuple(job.trained and t is not None and t.requires_grad for t in given)
        run = _Pass(Linear(hidden, weight, bias), LowRank.of(down, up, columns), job, ctx.needed)
        logps = run.logps()
        ctx.job = job
        # No saved tensors: backward scales them where they lie and gives them away.
        made = run.made()
        ctx.made, ctx.rest = made[:6], made[6:]
        ctx.save_for_backward(*given)
        ctx.set_materialize_grads(False)
        per_pair = job.losses.per_pair(logps)
        ctx.mark_non_differentiable(per_pair)
        return job.losses.total(per_pair), logps, per_pair

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, g_logps: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        kept, ctx.made = ctx.made, None
        upstream = g if g is not None else g_logps
        if upstream is None:
            return (None,) * 7
        with torch.no_grad(), without_autocast(upstream.device):
            if kept is None or g_logps is not None:
                # a second backward pass through one graph, or a term beside the loss
                linear, low = Linear(*given[:3]), LowRank.of(*given[3:])
                again = _Pass(linear, low, ctx.job, ctx.needed, (g, g_logps))
                again.logps()
                made, g = again.made(), None
            else:
                made = _Made(*kept, *ctx.rest)
            del kept
            grads = made.times(g, given)
        return (*(None if d is None else differentiable_once(d, upstream) for d in grads), None)


class _TracedPairwiseHead(torch.autograd.Function):
    """As `_PairwiseHead` in a graph of the compiler: what forward made are outputs, and the
    log-probs have no gradient, because a graph has both backward passes or one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        columns: Tensor | None,
        job: _Job,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (hidden, weight, bias, down, up, columns)
        ctx.needed = tuple(job.trained and t is not None and t.requires_grad for t in given)
        run = _Pass(Linear(hidden, weight, bias), LowRank.of(down, up, columns), job, ctx.needed)
        logps = run.logps()
        made = run.made()
        # One by one: the compiler of torch 2.8 cuts no named tuple.
        dx, dw, db, ddown, dup, dcolumns, place, unit, scale, ctx.height = made
        ctx.save_for_backward(*given, dx, dw, db, ddown, dup, dcolumns, place, unit, scale)
        per_pair = job.losses.per_pair(logps)
        ctx.mark_non_differentiable(logps, per_pair)
        return job.losses.total(per_pair), logps, per_pair

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, down, up, columns, *made = ctx.saved_tensors
        dx, dw, db, ddown, dup, dcolumns, place, unit, scale = made
        again = _Made(dx, dw, db, ddown, dup, dcolumns, place, unit, scale, ctx.height)
        return (*again.times(g, (hidden, weight, bias, down, up, columns), False), None)


class _Made(NamedTuple):
    """Gradients of the loss made in the forward pass, each at a scale of its own."""

    dx: Tensor | None
    """(M, H), row i is ``dX[place[i]] / unit[i]``"""
    dw: Tensor | None
    db: Tensor | None
    down: Tensor | None
    up: Tensor | None
    columns: Tensor | None
    """those of the adapter"""
    place: Tensor
    unit: Tensor | None
    """(M,) powers of 2, or None for 1"""
    scale: Tensor | None
    """scalar, what all but ``dx`` were multiplied by, or None for 1"""
    height: int

    def times(
        self, g: Tensor | None, given: tuple[Tensor, ...], own: bool = True
    ) -> list[Tensor | None]:
        """``g`` times each gradient, in the dtype of what was given and it is the gradient of; with
        ``own`` no second float32 buffer of the size of dW.
        """
        hidden, *others = given
        dx, dw, db, down, up, columns, place, unit, scale, _ = self
        if g is not None and host_values(g) and g == 1:  # of most: `loss.backward()`
            g = None
        if dx is not None:
            rows = Rows(place, place, self.height)
            factor = g if unit is None else unit[:, None] if g is None else (unit * g)[:, None]
            scaled = (dx if factor is None else dx * factor).to(hidden.dtype)
            dx = rows.new_gradient(scaled).index_copy_(0, place, scaled)[: self.height]
        if scale is not None:
            g = 1 / scale if g is None else g / scale
        made = []
        for d, t in zip((dw, db, down, up, columns), others, strict=True):
            made.append(d if d is None else times(d, g, t.dtype, own))
        return [dx, *made]


class _Pass:
    """The buffers of one forward pass, and what a chunk of pairs does with them.

    In float16 dz is scaled so that the largest coefficient of all chunks until now is at the top of
    its range (`room`): ``scale``, which dW keeps, multiplied when it falls. Rows of dX are kept
    over the power of 2 of their own coefficient, ``unit``.
    """

    def __init__(
        self,
        linear: Linear,
        low: LowRank | None,
        job: _Job,
        needed: tuple[bool, ...],
        upstream: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> None:
        self.job, self.upstream = job, upstream
        hidden, weight, _ = linear
        table, head = job.table, job.head
        rows = Rows.of(table.logit_rows, table.targets, hidden.shape[0])
        need_x, need_w, need_b, *need_low = needed
        self.work = Work.of(linear, rows, head, low=low, keeps_base=need_low[2])
        self.low = None
        if low is not None and any(need_low):
            self.low = LowRankSums(low, tuple(need_low), head.dtype)
        M = table.n_tokens
        half = head.dtype == torch.float16
        self.dx = hidden.new_empty(M, hidden.shape[1]) if need_x else None
        is_one = head.chunk_rows >= M and (job.chunk_pairs or table.n_groups) >= table.n_groups
        new_dw = weight.shape, head.dtype, weight.device, M, int(is_one)
        self.dw = new_sum(*new_dw) if need_w else None
        self.db = weight.new_zeros(len(weight), dtype=self._wide) if need_b else None
        self.unit = hidden.new_ones(M, dtype=torch.float32) if half and need_x else None
        self.scale = hidden.new_full((), 2.0**105, dtype=torch.float32) if half else None
        self.headroom = low.headroom() if half and low is not None else None
        self.first = True
        self.equal: Tensor | None = None

    def made(self) -> _Made:
        rows = self.work.rows
        down, up, columns = (None, None, None) if self.low is None else self.low.all()
        weights = (self.dw, self.db, down, up, columns)
        return _Made(self.dx, *weights, rows.place, self.unit, self.scale, rows.height)

    def logps(self) -> Tensor:
        """(N, 2) log-probs; the gradients, if any, are then complete."""
        table, hidden = self.job.table, self.work.hidden
        with torch.no_grad(), without_autocast(hidden.device):
            if torch.compiler.is_compiling():
                sums = [self.pairs(p, ends) for p, ends in self._equal_chunks()]
            else:
                offsets, most = table.host_offsets.tolist(), self.job.head.chunk_rows
                chunks = chunks_of_pairs(offsets, most, self.job.chunk_pairs)
                sums = [self.pairs(p, offsets[2 * p.start : 2 * p.stop + 1]) for p in chunks]
        if self.first and self.dw is not None:  # no pair has a token
            self.dw.zero_()
        return joined(sums) if sums else hidden.new_zeros(0, 2, dtype=self._wide)

    def _equal_chunks(self) -> Iterator[tuple[slice, list[int]]]:
        """Chunks whose borders follow from shapes: all pairs, or ``chunk_pairs`` at a time if all
        pairs have as many tokens; where they do not, the log-probs are NaN.
        """
        table, most = self.job.table, self.job.chunk_pairs
        N, M = table.n_groups, table.n_tokens
        if most is None or most >= N:
            yield slice(0, N), [0, M]
            return
        tokens = M // N
        place = torch.arange(N + 1, device=table.device) * tokens
        self.equal = (table.seq_offsets[::2] == place).all()
        for start in range(0, N, most):
            stop = min(start + most, N)
            yield slice(start, stop), [start * tokens, stop * tokens]

    def pairs(self, pairs: slice, offsets: list[int]) -> Tensor:
        """(n, 2) log-probs of some whole pairs; adds their part of the gradients."""
        first, last = offsets[0], offsets[-1]
        pieces = [
            slice(first + p.start, first + p.stop) for p in self.job.head.chunks(last - first)
        ]
        folded = [self._fold(piece) for piece in pieces]
        borders = self.job.table.seq_offsets[2 * pairs.start : 2 * pairs.stop + 1] - first
        weights = self.job.table.weights
        weights = None if weights is None else weights[first:last]
        values = joined([values[0] for _, _, (values, _) in folded])
        add: Callable[..., Tensor] = ops.segment_sum if self.job.head.kernels else twin.segment_sum
        if self.equal is not None:
            borders = borders.clamp(0, last - first)
        logps = add(values, weights, borders).reshape(-1, 2)
        if self.equal is not None:
            logps = torch.where(self.equal, logps, math.nan)
        if not self.job.trained:
            return logps
        g = token_grad(self._coefficients(logps, pairs), weights, borders, last - first)
        scaled = g if self.scale is None else self._lift(g, slice(first, last))
        for piece, (x, z, (_, state)) in zip(pieces, folded, strict=True):
            if len(pieces) > 1:  # the scratch held another piece since
                z = self.work.logits(x)
            start, stop = piece.start - first, piece.stop - first
            part = scaled[start:stop]
            dz = self.job.head.gradient(z, self.work.rows.targets[piece], state, part)
            if self.job.losses.pairs.weight is not None:  # what has no gradient is not read
                x = x.masked_fill((part == 0)[:, None], 0)
            self._add(piece, x, dz, self.work.kept(z))
        return logps

    @property
    def _wide(self) -> torch.dtype:
        return wide(self.job.head.dtype)

    def _coefficients(self, logps: Tensor, pairs: slice) -> Tensor:
        """(2n,) dL/dlogp, times the upstream gradients where they are known."""
        g, g_logps = (None, None) if self.upstream is None else self.upstream
        if g is None and g_logps is not None:
            return g_logps[pairs].reshape(-1).to(logps.dtype)
        c = self.job.losses.slopes(logps, pairs)
        if g is not None:
            c = c * g
        return (c if g_logps is None else c + g_logps[pairs]).reshape(-1)

    def _lift(self, g: Tensor, chunk: slice) -> Tensor:
        """``g * scale``, after the scale was lowered to what the chunk's largest ``g`` allows."""
        assert self.scale is not None
        if not g.shape[0]:
            return g
        size = torch.where(g.isfinite(), g.abs(), 0.0)
        how, largest = self.job.head.how, size.amax()
        grown = largest if self.headroom is None else largest * self.headroom
        scale = torch.minimum(self.scale, room(grown, how.logit_scale / how.temperature))
        if not self.first:
            lower = scale / self.scale
            low = [] if self.low is None else self.low.all()
            for total in (self.dw, self.db, *low):
                if total is not None and not (host_values(lower) and lower == 1):
                    total.mul_(lower)
        self.scale = scale
        if self.unit is not None:
            # 2^40 below the largest nothing is left of a row in any case
            floor = (largest * 2.0**-40).clamp(min=2.0**-100)
            _, exponent = torch.frexp(torch.maximum(size, floor))
            self.unit[chunk.start : chunk.stop] = torch.ldexp(torch.ones_like(size), exponent)
        return g * scale

    def _fold(self, piece: slice) -> tuple[Tensor, Tensor, Folded]:
        x = self.work.gather(piece)
        z = self.work.logits(x)
        return x, z, self.work.fold(x, z, piece, False)

    def _add(self, piece: slice, x: Tensor, dz: Tensor, base: Tensor | None) -> None:
        if self.db is not None:
            self.db += dz.sum(0, dtype=self._wide)
        du = None if self.work.low is None else self.work.low.back(dz)
        if self.low is not None and du is not None:
            self.low.add(dz, du, x, base)
        if self.dx is not None:
            rows = self.work.back(dz, du)
            if self.unit is not None and self.scale is not None:
                rows = rows / (self.unit[piece.start : piece.stop] * self.scale)[:, None]
            self.dx[piece.start : piece.stop] = rows
        elif self.dw is not None:
            self.work.scale(dz)
        if self.dw is not None:
            add_product(self.dw, dz, x, first=self.first)
        self.first = False
