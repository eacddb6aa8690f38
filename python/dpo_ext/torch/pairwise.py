"""Head and loss in one: with the reference known, a chunk of whole pairs knows its gradient.

Letters: N pairs, M tokens of the table, R rows of hidden states, H hidden, V vocabulary. ``c`` =
dL/d(log-prob of a sequence), a function of the pair's own log-probs. One pass over the chunks:
logits, fold, sums, c, dz, dX, dW: 6MHV, where folding first and recomputing costs 8MHV. A pair
that is longer than a chunk is folded piece by piece and then run again: 8MHV for that pair alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpo_ext.errors import TensorError
from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch.logps import twin
from dpo_ext.torch.logps.head import Folded, Head, HeadOptions, Linear, Rows, Work
from dpo_ext.torch.logps.linear import choose_plan, linear_sequence_logps
from dpo_ext.torch.logps.products import add_product, new_sum, product, wide
from dpo_ext.torch.logps.scores import (
    Impl,
    Transform,
    check_is_table,
    check_plain,
    token_grad,
)
from dpo_ext.torch.losses.compat import find_loss
from dpo_ext.torch.losses.pairs import PreferenceLoss, preference_loss
from dpo_ext.torch.losses.ranks import check_group, count_pairs
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
    lengths: Tensor | None = None,
    pair_weight: Any = None,
    num_pairs: float | Tensor | None = None,
    compat: str | None = None,
    loss_weights: Sequence[float] | None = None,
    group: Any = None,
    plan: Plan = "auto",
    chunk_rows: int | None = None,
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
        hidden, weight, table, bias, chunk_rows, exact_target: as in `linear_sequence_logps`;
            ``group_size`` 2.
        ref_logps: (N, 2) of the frozen reference, cast to the dtype of the log-probs. None only
            for losses without one.
        loss, beta, num_pairs, compat, loss_weights, group, **params: as in `preference_loss`.
        pair_weight: its ``weight``, a factor of each pair, (N,).
        lengths: (N, 2); default for losses by name: ``table.lengths``.
        plan: ``"pairwise"`` (losses by name in which a pair's gradient depends on that pair
            alone), ``"frozen"``, ``"recompute"``, or ``"auto"``: ``frozen`` for a weight without
            gradient, else ``pairwise`` if the loss allows it, else ``recompute``.
        temperature, softcap, logit_scale, impl: as in `sequence_logps`.

    Returns:
        PreferenceLoss; ``.plan`` is the plan that was taken. With ``pairwise``, the gradient is
        that of ``.loss``; ``.per_pair`` has none.

    Raises:
        As `linear_sequence_logps` and `preference_loss`. ValueError: ``plan="pairwise"`` for a
        loss that couples the batch, a callable, ``compat``, or a parameter that needs a gradient.

    Numerics: as `linear_sequence_logps`. In the forward pass gradients are kept N times larger
    (a power of 2 near it), so that float16 does not lose what the loss scale would have saved. A
    second backward pass through the same loss computes them again.

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
    if plan not in PLANS:
        raise ValueError(f"`plan` must be one of {', '.join(PLANS)}, found {plan!r}")
    if lengths is None and (isinstance(loss, str) or not callable(loss)):
        lengths = table.lengths
    options = {"loss": loss, "num_pairs": num_pairs, "compat": compat, "loss_weights": loss_weights}
    if group is not None:
        options["group"] = group
    by_pair = {"beta": beta, "weight": pair_weight, **params}
    why_not = _not_pairwise(loss, compat, [beta, pair_weight, *params.values()])
    if plan == "pairwise" and why_not:
        raise ValueError(f'`plan="pairwise"` needs another loss: {why_not}\nhint: use plan="auto"')
    if plan == "auto":
        plan = choose_plan("auto", weight, bias)
        if plan == "recompute" and not why_not:
            plan = "pairwise"
    if plan != "pairwise":
        logps = linear_sequence_logps(
            hidden,
            weight,
            table,
            bias=bias,
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
        out.plan = plan
        return out

    table.check_host_offsets()
    scored = table.without_zero_weights()
    linear = Linear.of(hidden, weight, bias, scored)
    how = Transform.of(logit_scale, softcap, temperature)
    head = Head.of(linear, HeadOptions(how, impl, chunk_rows, exact_target))
    N, ref = table.n_groups, ref_logps
    if ref is not None:
        ref = ref.to(wide(head.dtype))
        if tuple(ref.shape) != (N, 2):
            raise TensorError(f"`ref_logps` must have shape ({N}, 2), found {tuple(ref.shape)}")
    ranks = check_group(options.get("group"))
    if num_pairs is None:  # with it `group` is an error, which `preference_loss` raises
        options.pop("group", None)
        options["num_pairs"] = float(max(N, 1))
        if ranks is not None:
            like = hidden.new_zeros((), dtype=wide(head.dtype))
            options["num_pairs"] = count_pairs(N, like, ranks)
    losses = _Losses(ref, lengths, options, by_pair, N)
    job = _Job(scored, head, losses, linear.trains())
    total, logps = _PairwiseHead.apply(*linear, job)
    out = losses.all(logps)
    out.loss, out.per_pair, out.plan = total, out.per_pair.detach(), plan
    return out


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
    """`preference_loss` with everything but the log-probs, for all pairs or some."""

    ref_logps: Tensor | None
    lengths: Tensor | None
    options: dict[str, Any]
    by_pair: dict[str, Any]
    pairs: int

    def all(self, logps: Tensor) -> PreferenceLoss:
        return self.some(logps, slice(0, self.pairs))

    def some(self, logps: Tensor, pairs: slice) -> PreferenceLoss:
        def cut(value: Any) -> Any:
            many = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1
            return value[pairs] if many and len(value) == self.pairs else value

        return preference_loss(
            logps,
            None if self.ref_logps is None else self.ref_logps[pairs],
            lengths=None if self.lengths is None else self.lengths[pairs],
            **self.options,
            **{name: cut(value) for name, value in self.by_pair.items()},
        )

    def coefficients(self, logps: Tensor, pairs: slice) -> Tensor:
        """(n, 2) dL/dlogp of some pairs of the batch."""
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            return torch.autograd.grad(self.some(leaf, pairs).loss, leaf)[0]


def chunks_of_pairs(offsets: Sequence[int], most: int) -> Iterator[slice]:
    """Whole pairs whose tokens fit into ``most`` rows, or one pair that does not.

    ``offsets`` (2N+1,) are those of the table, on the host.

    >>> list(chunks_of_pairs([0, 2, 3, 5, 6, 16, 20], 8))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    borders = offsets[::2]
    start = 0
    for pair in range(1, len(borders)):
        if pair > start + 1 and borders[pair] - borders[start] > most:
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


class _PairwiseHead(torch.autograd.Function):
    """``(loss, log-probs (N, 2))``; the loss is differentiable, from gradients made in forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor]:
        linear = Linear(hidden, weight, bias)
        ctx.needed = tuple(job.trained and t is not None and t.requires_grad for t in linear)
        run = _Pass(linear, job, ctx.needed)
        logps = run.logps()
        total = job.losses.all(logps).loss.detach().clone()
        ctx.scale, ctx.height, ctx.place = run.scale, hidden.shape[0], run.work.rows.place
        ctx.job = job
        # No saved tensors: backward scales them where they lie and gives them away.
        ctx.made = (run.dx, run.dw, run.db)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(logps)
        return total, logps

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        made, ctx.made = ctx.made, None
        if made is None:  # a second backward pass through one graph
            again = _Pass(Linear(hidden, weight, bias), ctx.job, ctx.needed)
            again.logps()
            made = (again.dx, again.dw, again.db)
        dx, dw, db = made
        del made
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            factor = g / ctx.scale
            if dx is not None:
                rows = Rows(ctx.place, ctx.place, ctx.height)
                scaled = (dx * factor).to(hidden.dtype)
                dx = rows.new_gradient(scaled).index_copy_(0, ctx.place, scaled)[: ctx.height]
            if dw is not None:  # no second float32 buffer of its size
                dw = dw.mul_(factor).to(weight.dtype)
            if db is not None:
                db = db.mul_(factor).to(bias.dtype)
        grads = (None if d is None else differentiable_once(d, g) for d in (dx, dw, db))
        return (*grads, None)


class _Pass:
    """The buffers of one forward pass, and what a chunk of pairs does with them."""

    def __init__(self, linear: Linear, job: _Job, needed: tuple[bool, ...]) -> None:
        self.job = job
        hidden, weight, _ = linear
        table, head, pairs = job.table, job.head, job.losses.pairs
        self.work = Work.of(linear, Rows.of(table.logit_rows, table.targets, hidden.shape[0]), head)
        self.scale = 2.0 ** (pairs - 1).bit_length() if pairs else 1.0
        need_x, need_w, need_b = needed
        M = table.n_tokens
        self.dx = hidden.new_empty(M, hidden.shape[1]) if need_x else None
        self.dw = new_sum(weight.shape, head.dtype, weight.device, M) if need_w else None
        self.db = weight.new_zeros(len(weight), dtype=self._wide) if need_b else None
        self.first = True

    def logps(self) -> Tensor:
        """(N, 2) log-probs; the gradients, if any, are then complete."""
        offsets, hidden = self.job.table.host_offsets.tolist(), self.work.hidden
        chunks = chunks_of_pairs(offsets, self.job.head.chunk_rows)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            sums = [self.pairs(p, offsets[2 * p.start : 2 * p.stop + 1]) for p in chunks]
        if self.first and self.dw is not None:  # no pair has a token
            self.dw.zero_()
        return torch.cat(sums) if sums else hidden.new_zeros(0, 2, dtype=self._wide)

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
        joined = torch.cat([values[0] for _, _, (values, _) in folded])
        add: Callable[..., Tensor] = (
            torch.ops.dpo_ext.segment_sum if self.job.head.kernels else twin.segment_sum
        )
        logps = add(joined, weights, borders).reshape(-1, 2)
        if not self.job.trained:
            return logps
        c = self.job.losses.coefficients(logps, pairs) * self.scale
        g = token_grad(c.reshape(-1), weights, borders, last - first)
        for piece, (x, z, (_, state)) in zip(pieces, folded, strict=True):
            if len(pieces) > 1:  # the scratch held another piece since
                z = self.work.logits(x)
            part = g[piece.start - first : piece.stop - first]
            dz = self.job.head.gradient(z, self.work.rows.targets[piece], state, part)
            self._add(piece, x, dz)
        return logps

    @property
    def _wide(self) -> torch.dtype:
        return wide(self.job.head.dtype)

    def _fold(self, piece: slice) -> tuple[Tensor, Tensor, Folded]:
        x = self.work.gather(piece)
        z = self.work.logits(x)
        return x, z, self.work.fold(x, z, piece, False)

    def _add(self, piece: slice, x: Tensor, dz: Tensor) -> None:
        if self.dx is not None:
            self.dx[piece] = product(dz, self.work.weight)
        if self.dw is not None:
            add_product(self.dw, dz, x, first=self.first)
        if self.db is not None:
            self.db += dz.sum(0, dtype=self._wide)
        self.first = False
