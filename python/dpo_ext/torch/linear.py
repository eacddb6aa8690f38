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

Scratch is one chunk of logits, C * V; ``frozen`` keeps E (M, H) and ``recompute`` two floats a row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.errors import TensorError
from dpo_ext.torch import twin
from dpo_ext.torch.logps import (
    TokenScores,
    Transform,
    check_is_table,
    check_stats,
    check_table,
    differentiable_once,
    only,
    sum_sequences,
    uses_kernels,
)
from dpo_ext.torch.table import IGNORE_INDEX, ScoreTable

PLANS = ("auto", "frozen", "recompute")
SCRATCH_BYTES = 1_100_000_000
"""Default bound of one chunk of logits: 4096 rows of 128k bfloat16."""
_NO_ROW = -1  # target of a token whose row does not exist: the fold answers NaN


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    table: ScoreTable,
    *,
    bias: Tensor | None = None,
    plan: str = "auto",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
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
        table: rows of ``hidden``, targets, sequences; on the device of ``hidden``. A table from
            ``from_labels`` multiplies its ignored rows too: ``.compact()`` drops them (one wait).
        bias: (V,) or None.
        plan: ``"frozen"`` (neither weight nor bias needs a gradient), ``"recompute"``, or
            ``"auto"``, the first that serves.
        chunk_rows: rows of one chunk, >= 1; default: as many as keep one chunk of logits within
            1.1 GB (4096 rows of 128k bfloat16).
        temperature, softcap, logit_scale, impl: as in `sequence_logps`.

    Returns:
        (n_groups, group_size), float32 (float64 for float64), differentiable once in ``hidden``,
        ``weight`` and ``bias``.

    Raises:
        TensorError: shape, dtype or device is not as above; ``weight`` is a DTensor.
        ValueError: ``plan``, ``chunk_rows`` or a scalar out of its range; ``plan="frozen"`` with a
            weight that needs a gradient.
        KernelUnavailable: as `sequence_logps`.

    Numerics: logits are rounded to the dtype of the product, as a model's are; all else is float32.
    dW and db are added over chunks in float32 and rounded once. Hidden rows that are not scored
    are never used: NaN there changes nothing and their gradient is 0. The same call gives the same
    bits; those of a product depend on its shape, so ``chunk_rows`` may change the last ones.
    Nothing is computed for a gradient under ``no_grad``.

    >>> hidden, weight = torch.zeros(2, 3, 8), torch.zeros(4, 8)      # V = 4
    >>> labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
    >>> linear_sequence_logps(hidden, weight, ScoreTable.from_labels(labels))
    tensor([[-2.7726, -1.3863]])
    """
    how = Transform.of(logit_scale, softcap, temperature)
    check_is_table(table)
    scores, kernels = _score(
        hidden, weight, bias, table.without_zero_weights(), plan, chunk_rows, how, False, impl
    )
    return sum_sequences(scores.logps, table, kernels)


def linear_token_scores(
    hidden: Tensor,
    weight: Tensor,
    table: ScoreTable,
    *,
    stats: Iterable[str] = (),
    bias: Tensor | None = None,
    plan: str = "auto",
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str = "auto",
) -> TokenScores:
    """Log-prob and, on request, statistics of each token, from hidden states.

    Same as ``token_scores(hidden @ weight.T + bias, table, stats=stats, ...)``; the statistics come
    from the same read of each chunk.

    Args:
        stats: any of ``"entropy"``, ``"mean_logit"``, ``"log_sum_sq"``, ``"is_top1"``.
        hidden, weight, table, bias, plan, chunk_rows: as in `linear_sequence_logps`; the table's
            weights are not applied here.
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
    scores, _ = _score(hidden, weight, bias, table, plan, chunk_rows, how, bool(names), impl)
    return only(scores, names)


class Head(NamedTuple):
    """How one call computes: what does not change from chunk to chunk."""

    how: Transform
    kernels: bool
    dtype: torch.dtype
    """Of the products: that of ``hidden``, or autocast's."""
    chunk_rows: int

    def chunks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, tokens))

    def scratch(self, weight: Tensor, tokens: int) -> Tensor:
        """(C, V) that every chunk's logits are written into."""
        rows = min(self.chunk_rows, tokens)
        return torch.empty(rows, weight.shape[0], dtype=self.dtype, device=weight.device)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Tensor) -> Tensor:
        z = scratch[: x.shape[0]]
        if bias is None:
            return torch.mm(x, weight.t(), out=z)
        return torch.addmm(bias, x, weight.t(), out=z)

    def fold(self, z: Tensor, targets: Tensor, stats: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Log-probs and statistics of each row, and what `gradient` needs of them."""
        rows = torch.arange(z.shape[0], device=z.device)
        if self.kernels:
            out = torch.ops.dpo_ext.token_stats(z, rows, targets, *self.how, stats)
            return [out[0], *out[3:]], [out[1], out[2]]
        return list(twin.token_stats(z, rows, targets, *self.how, stats)), []

    def gradient(self, z: Tensor, targets: Tensor, kept: list[Tensor], g: Tensor) -> Tensor:
        """dz; the kernels write it over z."""
        rows = torch.arange(z.shape[0], device=z.device)
        if self.kernels:
            torch.ops.dpo_ext.logits_grad_(z, rows, targets, *kept, g, *self.how)
            return z
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            logps = twin.token_stats(leaf, rows, targets, *self.how, False)[0]
            (dz,) = torch.autograd.grad(logps, leaf, g.to(logps.dtype))
        return torch.where(g[:, None] != 0, dz, 0.0)  # as the kernels: 0 of NaN is 0


def _score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: ScoreTable,
    plan: str,
    chunk_rows: int | None,
    how: Transform,
    stats: bool,
    impl: str,
) -> tuple[TokenScores, bool]:
    """All statistics or none of each token, and whether the kernels computed them."""
    rows = check_head(hidden, weight, bias, table)
    frozen = choose_plan(plan, weight, bias) == "frozen"
    head = make_head(rows, weight, how, chunk_rows, impl)
    keep_e = frozen and torch.is_grad_enabled() and rows.requires_grad
    out = _LinearLogps.apply(
        rows, weight, bias, table.logit_rows, table.targets, head, stats, frozen, keep_e
    )
    return TokenScores(*out), head.kernels


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, table: ScoreTable) -> Tensor:
    """(R, H) view of ``hidden`` after comparing everything's shape, dtype and device."""
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"`{name}` must be a torch.Tensor, found {type(value).__name__}")
        if is_dtensor(value):
            raise TensorError(
                f"`{name}` must be a plain tensor, found a DTensor\n"
                "hint: score inside the wrapped model: model = wrap(attach_scoring(model))"
            )
    if hidden.dim() not in (2, 3):
        raise TensorError(
            f"`hidden` must have shape (R, H) or (B, T, H), found {tuple(hidden.shape)}"
        )
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
            ours, theirs = (str(t.dtype).removeprefix("torch.") for t in (hidden, value))
            raise TensorError(f"`{name}` must be {ours}, as `hidden` is, found {theirs}")
    check_table(table, rows, "hidden")
    return rows


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor, without importing torch.distributed for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def choose_plan(plan: str, weight: Tensor, bias: Tensor | None) -> str:
    """``"frozen"`` or ``"recompute"``; ValueError for a plan that cannot serve."""
    if plan not in PLANS:
        hint = "\nhint: that is the plan of linear_preference_loss" if plan == "pairwise" else ""
        raise ValueError(f"`plan` must be one of {', '.join(PLANS)}, found {plan!r}{hint}")
    trained = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if plan == "frozen" and trained:
        raise ValueError(
            '`plan="frozen"` needs a weight and a bias without gradient\n'
            'hint: use plan="recompute", or plan="auto" to choose'
        )
    return "recompute" if trained or plan == "recompute" else "frozen"


def make_head(
    rows: Tensor, weight: Tensor, how: Transform, chunk_rows: int | None, impl: str
) -> Head:
    """The dtype of the products, kernels or twin, and the size of a chunk."""
    if not rows.is_floating_point():
        found = str(rows.dtype).removeprefix("torch.")
        raise TensorError(f"`hidden` must have a floating-point dtype, found {found}")
    dtype, where = rows.dtype, rows.device.type
    if torch.is_autocast_enabled(where) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(where)
    kernels = uses_kernels(torch.empty(0, dtype=dtype, device=rows.device), impl, "hidden")
    if chunk_rows is None:
        fit = SCRATCH_BYTES // max(weight.shape[0] * dtype.itemsize, 1)
        chunk_rows = max(fit // 256 * 256 or fit, 1)
    elif isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"`chunk_rows` must be an int or None, found {type(chunk_rows).__name__}")
    elif chunk_rows < 1:
        raise ValueError(f"`chunk_rows` must be at least 1, found {chunk_rows}")
    return Head(how, kernels, dtype, chunk_rows)


class Rows(NamedTuple):
    """The rows of a table within hidden states (R, H); nothing here waits for the device."""

    place: Tensor
    """(M,) int64, the token's row; R for a token that is not scored or whose row does not exist."""
    targets: Tensor
    """(M,) int32; outside [0, V) where the row does not exist, so that its log-prob is NaN."""
    height: int

    @staticmethod
    def of(logit_rows: Tensor, targets: Tensor, height: int) -> Rows:
        scored = targets != IGNORE_INDEX
        exists = (logit_rows >= 0) & (logit_rows < height)
        place = torch.where(scored & exists, logit_rows, height)
        return Rows(place, targets.masked_fill(scored & ~exists, _NO_ROW), height)

    def gather(self, hidden: Tensor, chunk: slice, dtype: torch.dtype) -> Tensor:
        """(C, H): zeros where there is no row, whatever lies in the rows that are not scored."""
        place = self.place[chunk]
        missing = (place == self.height)[:, None]
        if not self.height:
            return hidden.new_zeros(place.shape[0], hidden.shape[1], dtype=dtype)
        x = hidden.index_select(0, place.clamp(max=self.height - 1))
        return x.to(dtype).masked_fill_(missing, 0)

    def new_gradient(self, like: Tensor) -> Tensor:
        """(R+1, H) zeros; the spare last row takes what belongs nowhere."""
        return like.new_zeros(self.height + 1, like.shape[1])


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` added in float32; on a GPU also given in float32, so that no split is rounded."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total = a @ b`` or ``total += a @ b``, total in float32 (float64 for float64)."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:  # the CPU has no product of one dtype into another
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearLogps(torch.autograd.Function):
    """Log-probs (M,) and statistics, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_rows: Tensor,
        targets: Tensor,
        head: Head,
        stats: bool,
        frozen: bool,
        keep_e: bool,
    ) -> tuple[Tensor, ...]:
        rows, M = Rows.of(logit_rows, targets, hidden.shape[0]), targets.shape[0]
        parts: list[list[Tensor]] = []
        kept: list[list[Tensor]] = []
        e = hidden.new_empty(M, hidden.shape[1]) if keep_e else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(head.dtype)
            b = None if bias is None else bias.to(head.dtype)
            scratch = head.scratch(w, M)
            for chunk in head.chunks(M):
                t = rows.targets[chunk]
                z = head.logits(rows.gather(hidden, chunk, head.dtype), w, b, scratch)
                values, state = head.fold(z, t, stats)
                parts.append(values)
                kept.append(state)
                if e is not None:
                    dz = head.gradient(z, t, state, torch.ones_like(values[0]))
                    e[chunk] = product(dz, w)
        if not parts:
            empty, t = scratch[:0], rows.targets
            values, state = head.fold(empty, t, stats)
            parts, kept = [values], [state]
        out = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        state = [torch.cat(column) for column in zip(*kept, strict=True)]
        ctx.head, ctx.frozen, ctx.count = head, frozen, hidden.shape[0]
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        if frozen:
            ctx.save_for_backward(rows.place, rows.targets, e)
        else:
            ctx.save_for_backward(rows.place, rows.targets, hidden, weight, bias, *state)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 9
        place, targets, *saved = ctx.saved_tensors
        rows = Rows(place, targets, ctx.count)
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            backward = _backward_frozen if ctx.frozen else _backward_recompute
            grads: tuple[Tensor | None, ...] = backward(ctx, rows, g.contiguous(), *saved)
        once = [None if d is None else differentiable_once(d, g) for d in grads]
        return (*once, *(None for _ in range(6)))


def _backward_frozen(
    ctx: Any, rows: Rows, g: Tensor, e: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dX = g * E: the only thing that the upstream gradient changes is a factor of each row."""
    if e is None:
        return None, None, None
    column = g[:, None]
    scaled = torch.where(column != 0, column * e, 0.0).to(e.dtype)
    grad = rows.new_gradient(e).index_copy_(0, rows.place, scaled)
    return grad[: rows.height], None, None


def _backward_recompute(
    ctx: Any,
    rows: Rows,
    g: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *state: Tensor,
) -> tuple[Tensor | None, ...]:
    """Logits of each chunk again, then dz and its products."""
    head: Head = ctx.head
    need_x, need_w, need_b = ctx.needs_input_grad[:3]
    M, sums = rows.targets.shape[0], wide(head.dtype)
    w, b = weight.to(head.dtype), None if bias is None else bias.to(head.dtype)
    dx = rows.new_gradient(hidden) if need_x else None
    dw = torch.zeros(weight.shape, dtype=sums, device=weight.device) if need_w else None
    db = torch.zeros(weight.shape[0], dtype=sums, device=weight.device) if need_b else None
    scratch = head.scratch(w, M)
    for chunk in head.chunks(M):
        x, t = rows.gather(hidden, chunk, head.dtype), rows.targets[chunk]
        z = head.logits(x, w, b, scratch)
        dz = head.gradient(z, t, [part[chunk] for part in state], g[chunk])
        if dx is not None:
            dx.index_copy_(0, rows.place[chunk], product(dz, w).to(dx.dtype))
        if dw is not None:
            add_product(dw, dz.t(), x, first=chunk.start == 0)
        if db is not None:
            db += dz.sum(0, dtype=sums)
    del scratch
    dtypes = ctx.dtypes
    return (
        None if dx is None else dx[: rows.height],
        None if dw is None else dw.to(dtypes[1]),
        None if db is None else db.to(dtypes[2]),
    )
