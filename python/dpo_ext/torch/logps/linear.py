"""Log-probs from hidden states: the head's product inside, no (M, V) logits kept.

Letters: R rows of hidden states, H hidden, V vocabulary, M tokens of the table, C rows of a chunk.
``g`` = dL/dlogp of a token, ``dz = g * (onehot - p) * dy/dz`` of its row of logits.

The plans differ in what the forward pass keeps; a product of M rows costs 2MHV:

=============  ======================================  ==================================  =======
plan           forward, per chunk                      backward, per chunk                 cost
=============  ======================================  ==================================  =======
(no gradient)  logits, fold                                                                2MHV
frozen         logits, fold, dz for g = 1, E = dz W    dX = g * E                          4MHV
recompute      logits, fold                            logits, dz, dX = dz W, dW += dz^T X 8MHV
=============  ======================================  ==================================  =======

A trained adapter beside a frozen weight is ``recompute`` without dW, 6MHV.

Scratch is one chunk of logits, C * V; ``frozen`` keeps E (M, H) and ``recompute`` two floats a row
and that scratch, which still holds the logits of the last chunk when backward begins: 2CHV less,
and with a single chunk 6MHV, what autograd needs. On a CPU, large scratch that nobody holds stays
with the process for the next call, two of them at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch.logps import ops
from dpo_ext.torch.logps.head import Head, HeadOptions, Linear, Rows, Work
from dpo_ext.torch.logps.lowrank import NOTHING, LowRank, LowRankSums
from dpo_ext.torch.logps.products import add_product, joined, new_sum, part, wide
from dpo_ext.torch.logps.scores import (
    Impl,
    TokenScores,
    Transform,
    check_is_table,
    check_stats,
    only,
    sum_sequences,
    token_grad,
    without_autocast,
)
from dpo_ext.torch.numbers import transformed
from dpo_ext.torch.once import differentiable_once, node, one_by_one

Plan = Literal["auto", "frozen", "recompute"]
PLANS: tuple[Plan, ...] = get_args(Plan)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    table: ScoreTable,
    *,
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    plan: Plan = "auto",
    chunk_rows: int | None = None,
    exact_target: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """Log-prob of each sequence from hidden states and the head's weight.

    Same as::

        sequence_logps(hidden @ weight.T + bias, table, ...)        # temperature and the like

    but only rows of the table reach the product, and logits exist one chunk of rows at a time.
    With ``z = x W^T + b`` and dz as in `sequence_logps`: ``dX = dz W``, ``dW = dz^T X``, ``db`` the
    column sums of dz (plans and costs: head of this module).

    Args:
        hidden: (R, H) or (B, T, H) with R = B * T; float32, bfloat16, float16 or float64.
        weight: (V, H), the dtype of ``hidden`` (any under autocast); may be tied to the embedding.
        table: rows of ``hidden``, targets, sequences; on the device of ``hidden``, and for its
            (rows, T), if it knows one. A table from ``from_labels`` multiplies its ignored rows
            too: ``.compact()`` drops them (one wait).
        bias: (V,) or None.
        adapter: `LowRank` of LoRA or DoRA, whose products stand beside those of the weight, or
            None. Its products are made in its own dtype.
        plan: ``"frozen"`` (weight, bias and adapter need no gradient), ``"recompute"``, or
            ``"auto"``, the first that serves.
        chunk_rows: rows of one chunk, >= 1; default: as many as keep one chunk of logits within
            1.1 GB (4096 rows of 128k bfloat16).
        exact_target: the logit of each target is a product of its own, added and kept in float32,
            and takes the place of the rounded one in the log-prob, its sum and its gradient (not in
            the statistics). A bfloat16 logit near 30 is off by up to 0.06 nats, and a sequence adds
            up what its targets are off by; the other logits' roundings average out. Costs two
            reads of C * H.
        temperature, softcap, logit_scale, impl: as in `sequence_logps`.

    Returns:
        (n_groups, group_size), float32 (float64 for float64), differentiable once in ``hidden``,
        ``weight``, ``bias`` and the adapter's tensors.

    Raises:
        TensorError: shape, dtype or device is not as above; ``weight`` is a DTensor; on the CPU, a
            row not below R or an id not below V.
        ValueError: ``plan``, ``chunk_rows`` or a scalar out of its range; ``plan="frozen"`` with a
            weight that needs a gradient.
        KernelUnavailable: as `sequence_logps`.

    Numerics: logits are rounded to the dtype of the product, as a model's are; all else is float32.
    dW, db and those of the adapter are added over chunks in float32 and rounded once. Hidden rows
    that are not scored are never used: NaN there changes nothing and their gradient is 0. The same
    call gives the same bits; those of a product depend on its shape, so ``chunk_rows`` may change
    the last ones.
    Nothing is computed for a gradient under ``no_grad``.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)      # V = 4
    >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> linear_sequence_logps(hidden, weight, ScoreTable.from_labels(labels))
    tensor([[-2.7726, -1.3863]])
    """
    how = Transform.of(logit_scale, softcap, temperature)
    check_is_table(table)
    options = HeadOptions(how, impl, chunk_rows, exact_target)
    scored = table.without_zero_weights()
    linear = Linear.of(hidden, weight, bias, scored)
    head = Head.of(linear, options)
    if head.kernels:
        sums = (table.weights, table.seq_offsets)
        (logps,) = _score(linear, adapter, scored, plan, head, False, sums)
        return logps.reshape(-1, table.group_size)
    (logps,) = _score(linear, adapter, scored, plan, head, False)
    return sum_sequences(logps, table, False)


def linear_token_scores(
    hidden: Tensor,
    weight: Tensor,
    table: ScoreTable,
    *,
    stats: Iterable[str] = (),
    bias: Tensor | None = None,
    adapter: LowRank | None = None,
    plan: Plan = "auto",
    chunk_rows: int | None = None,
    exact_target: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: Impl = "auto",
) -> TokenScores:
    """Log-prob and, on request, statistics of each token, from hidden states.

    Same as ``token_scores(hidden @ weight.T + bias, table, stats=stats, ...)``; the statistics come
    from the same read of each chunk.

    Args:
        stats: any of ``"entropy"``, ``"mean_logit"``, ``"log_sum_sq"``, ``"is_top1"``.
        hidden, weight, table, bias, adapter, plan, chunk_rows, exact_target: as in
            `linear_sequence_logps`; the table's weights are not applied here.
        temperature, softcap, logit_scale, impl: as in `sequence_logps`.

    Returns:
        TokenScores: ``logps`` (M,) differentiable, the asked-for statistics (M,), else None.

    Raises:
        As `linear_sequence_logps`. ValueError: an unknown name in ``stats``.

    Numerics: as `linear_sequence_logps`.

    >>> table = ScoreTable.from_labels(torch.tensor([[-100, 1], [-100, 3]]))
    >>> hidden, weight = torch.zeros(2, 2, 8), torch.zeros(4, 8)
    >>> linear_token_scores(hidden, weight, table, stats=["entropy"]).entropy
    tensor([1.3863, 1.3863])
    """
    names = check_stats(stats)
    how = Transform.of(logit_scale, softcap, temperature)
    check_is_table(table)
    options = HeadOptions(how, impl, chunk_rows, exact_target)
    linear = Linear.of(hidden, weight, bias, table)
    scores = _score(linear, adapter, table, plan, Head.of(linear, options), bool(names))
    return only(TokenScores(*scores), names)


class _Call(NamedTuple):
    """What one call computes, and for which gradients."""

    head: Head
    stats: bool
    frozen: bool
    trained: bool
    left: list[Tensor]
    """The scratch that forward leaves to backward. Not a saved tensor: backward overwrites it, and
    hooks that move those need not see it.
    """


def _score(
    linear: Linear,
    low: LowRank | None,
    table: ScoreTable,
    plan: str,
    head: Head,
    stats: bool,
    sums: ops.Sums = ops.NO_SUMS,
) -> tuple[Tensor, ...]:
    """Log-probs of tokens, or of the sequences of ``sums``; all statistics or none."""
    check_adapter(low, linear)
    frozen = choose_plan(plan, linear.weight, linear.bias, low) == "frozen"
    if frozen:
        trained = torch.is_grad_enabled() and linear.hidden.requires_grad
    else:
        trained = linear.trains() or (low is not None and low.trains())
    rows = Rows.of(table.logit_rows, table.targets, linear.hidden.shape[0])
    call = _Call(head, stats, frozen, trained, [])
    out = node(_LinearLogps, *linear, *(low or NOTHING), rows, *sums, call)
    return out[: 5 if stats else 1]


def check_adapter(adapter: LowRank | None, linear: Linear) -> None:
    """An adapter that fits a head, or none."""
    if adapter is None:
        return
    if not isinstance(adapter, LowRank):
        raise TypeError(f"`adapter` must be a LowRank, found {type(adapter).__name__}")
    adapter.check(linear.hidden, linear.weight)


def choose_plan(
    plan: str, weight: Tensor, bias: Tensor | None, adapter: LowRank | None = None
) -> Literal["frozen", "recompute"]:
    """``"frozen"`` or ``"recompute"``; ValueError for a plan that cannot serve."""
    if plan not in PLANS:
        hint = "\nhint: that is the plan of linear_preference_loss" if plan == "pairwise" else ""
        raise ValueError(f"`plan` must be one of {', '.join(PLANS)}, found {plan!r}{hint}")
    trained = torch.is_grad_enabled() and (
        weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (adapter is not None and adapter.trains())
    )
    if plan == "frozen" and trained:
        raise ValueError(
            '`plan="frozen"` needs a weight, a bias and an adapter without gradient\n'
            'hint: use plan="recompute", or plan="auto" to choose'
        )
    return "recompute" if trained or plan == "recompute" else "frozen"


class _LinearLogps(torch.autograd.Function):
    """Log-probs (M,) and statistics, chunk by chunk. With ``seq_offsets`` their weighted sums over
    sequences stand in the place of the log-probs: one node, not two.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        columns: Tensor | None,
        rows: Rows,
        weights: Tensor | None,
        seq_offsets: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor | None, ...]:
        """Log-prob of each token, four statistics if asked for, ``e``, and what the gradient of
        each row needs.
        """
        (head, stats, frozen, trained, left), M = call, rows.targets.shape[0]
        parts: list[list[Tensor]] = []
        kept: list[list[Tensor]] = []
        e = hidden.new_empty(M, hidden.shape[1]) if frozen and trained else None
        sums = (weights, seq_offsets)
        alone = head.chunk_rows >= M and not head.exact_target
        low = LowRank.of(down, up, columns)
        one: Any = head.unit_gradient()
        if one != 1.0 and low is not None and low.columns is not None:
            one = one / low.headroom()
        with without_autocast(hidden.device):
            work = Work.of(Linear(hidden, weight, bias), rows, head, low=low)
            for chunk in head.chunks(M):
                x = work.gather(chunk)
                z = work.logits(x)
                values, state = work.fold(x, z, chunk, stats, sums if alone else ops.NO_SUMS)
                parts.append(values)
                kept.append(state)
                if e is not None:
                    unscaled = isinstance(one, float) and one == 1.0
                    g = values[0].new_ones((x.shape[0],))
                    g = g if unscaled else g * one
                    dz = head.gradient(z, part(rows.targets, chunk), state, g)
                    made = work.back(dz, None if low is None else low.back(dz))
                    e[chunk] = made if unscaled else made * (1.0 / one)
        out = [joined(column) for column in zip(*parts, strict=True)]
        if seq_offsets is not None and not alone:
            out[0] = ops.segment_sum(out[0], weights, seq_offsets)
        state = [joined(column) for column in zip(*kept, strict=True)]
        plain = torch.compiler.is_compiling() or transformed()
        # the gradient of columns needs the product beside the logits, which is gone
        if trained and not frozen and not plain and columns is None:
            left.append(work.scratch)
        return (*out, e, *([] if frozen else state))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        hidden, weight, bias, down, up, columns, rows, weights, seq_offsets, call = inputs
        ctx.head, ctx.frozen, ctx.height = call.head, call.frozen, (rows.height, rows.whole)
        ctx.left = call.left
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:6]]
        ctx.mark_non_differentiable(*[t for t in output[1:] if t is not None])
        ctx.set_materialize_grads(False)
        values, sums = 5 if call.stats else 1, (weights, seq_offsets)
        if call.frozen:
            ctx.save_for_backward(*sums, rows.place, rows.targets, output[values])
        else:
            state = output[values + 1 :]
            given = (hidden, weight, bias, down, up, columns)
            ctx.save_for_backward(*sums, rows.place, rows.targets, *given, *state)
        return output[:values]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 10
        weights, seq_offsets, place, targets, *saved = ctx.saved_tensors
        rows = Rows(place, targets, *ctx.height)

        def gradients(g: Tensor) -> tuple[Tensor | None, ...]:
            if seq_offsets is not None:
                g = token_grad(g, weights, seq_offsets, targets.shape[0])
            if ctx.frozen:
                return _backward_frozen(rows, g, *saved)
            hidden, weight, bias, down, up, columns, *state = saved
            linear, low = Linear(hidden, weight, bias), LowRank.of(down, up, columns)
            return _backward_recompute(ctx, linear, low, rows, state, g.contiguous())

        with torch.no_grad(), without_autocast(g.device):
            grads = one_by_one(gradients, g)
        once = [None if d is None else differentiable_once(d, g) for d in grads]
        return (*once, None, None, None, None)


def _backward_frozen(rows: Rows, g: Tensor, e: Tensor | None) -> tuple[Tensor | None, ...]:
    """dX = g * E: the only thing that the upstream gradient changes is a factor of each row."""
    if e is None:
        return (None,) * 6
    column = g[:, None]
    scaled = torch.where(column != 0, column * e, 0.0).to(e.dtype)
    grad = rows.new_gradient(e).index_copy_(0, rows.place, scaled)
    return grad[: rows.height], *(None,) * 5


def _backward_recompute(
    ctx: Any, linear: Linear, low: LowRank | None, rows: Rows, state: list[Tensor], g: Tensor
) -> tuple[Tensor | None, ...]:
    """Logits of each chunk again, then dz and its products."""
    head: Head = ctx.head
    need_x, need_w, need_b, *need_low = ctx.needs_input_grad[:6]
    (hidden, weight, _), M, sums = linear, rows.targets.shape[0], wide(head.dtype)
    dx = rows.new_gradient(hidden) if need_x else None
    chunks = list(head.chunks(M))[::-1]
    new_dw = weight.shape, head.dtype, weight.device, M, len(chunks)
    dw = new_sum(*new_dw) if need_w else None
    db = torch.zeros(weight.shape[0], dtype=sums, device=weight.device) if need_b else None
    # written over below: a second backward pass multiplies again
    last = ctx.left.pop() if ctx.left else None
    work = Work.of(linear, rows, head, last, low, keeps_base=need_low[2])
    sums_low = None
    if low is not None and any(need_low):
        sums_low = LowRankSums(low, tuple(need_low), head.dtype)
    for chunk in chunks:
        x, t, some_g = work.gather(chunk), part(rows.targets, chunk), part(g, chunk)
        if last is None or chunk is not chunks[0]:
            z = work.logits(x)
        else:
            z = part(last, slice(0, t.shape[0]))
        # a slice inside a comprehension would fix the sizes of a compiled graph
        first, end = chunk.start, chunk.stop
        kept = [part(values, slice(first, end)) for values in state]
        dz = head.gradient(z, t, kept, some_g)
        if dw is not None or sums_low is not None:
            x = x.masked_fill_((some_g == 0)[:, None], 0)  # what has no gradient is not read
        if db is not None:
            db += dz.sum(0, dtype=sums)
        du = None if low is None else low.back(dz)
        if sums_low is not None and du is not None:
            sums_low.add(dz, du, x, work.kept(z))
        if dx is not None:
            dx.index_copy_(0, part(rows.place, chunk), work.back(dz, du).to(dx.dtype))
        elif dw is not None:
            work.scale(dz)
        if dw is not None:
            add_product(dw, dz, x, first=chunk is chunks[0])
    del work, last, z, dz
    made = [None if dx is None else dx[: rows.height], dw, db]
    made += [None] * 3 if sums_low is None else sums_low.all()
    return tuple(
        None if d is None else d.to(dtype) for d, dtype in zip(made, ctx.dtypes, strict=True)
    )
