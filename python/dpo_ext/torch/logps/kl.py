"""KL divergence of whole rows between a policy and its reference, chunk by chunk.

Letters: R rows of logits, H hidden, V vocabulary, M tokens of the table, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable
from dpo_ext.torch.logps import twin
from dpo_ext.torch.logps.head import Head, Rows, check_head, make_head
from dpo_ext.torch.logps.products import add_product, product, wide
from dpo_ext.torch.logps.scores import Transform, check_plain, check_table
from dpo_ext.torch.once import differentiable_once

DIRECTIONS = ("ref_policy", "policy_ref")
CHUNK_BYTES = 64 << 20
"""Default bound of one chunk of float32 logits; a call has about six such buffers at a time."""


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    table: ScoreTable,
    *,
    direction: str = "ref_policy",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """KL between the reference's and the policy's whole distribution at each token of the table.

    Same as, with ``y`` and ``r`` the transformed rows of both as in `sequence_logps`::

        p, q = softmax(y[logit_rows]), softmax(r[logit_rows])
        kl = (q * (log q - log p)).sum(-1)        # "ref_policy": KL(reference, policy), TDPO
        kl = (p * (log p - log q)).sum(-1)        # "policy_ref": KL(policy, reference)

    ``d KL(q, p) / dy = p - q`` and ``d KL(p, q) / dy = p (log p - log q - KL)`` (Zeng et al. 2024,
    arXiv:2404.11999, eq. 11 and 12, take the first, summed over a completion).

    Args:
        logits: (R, V) or (B, T, V), float32, bfloat16, float16 or float64; of the policy.
        ref_logits: the same shape and device; of the reference, without gradient.
        table: which rows; targets only say which tokens are scored.
        direction: ``"ref_policy"`` or ``"policy_ref"``.
        temperature, softcap, logit_scale: as in `sequence_logps`, for both.
        chunk_rows: rows computed at a time, >= 1; by default 64 MB of float32.

    Returns:
        (M,) float32 (float64 for float64 logits), nats; differentiable once in ``logits``. A token
        that is not scored has 0.

    Raises:
        TensorError: shape, dtype or device is not as above, or a row of a table on the CPU is not
            below R.  ValueError: ``direction``, or a scalar out of its range.

    Numerics: float32 for every dtype but float64, sums over V in float64; at equal rows within 1e-7
    of 0, so that a value may be as negative as that. Where the left distribution is 0 it adds 0,
    where only the right one is 0 the value is inf. Nothing of size (M, V) is kept but the gradient.

    >>> table = ScoreTable(logit_rows=[0, 1], targets=[0, 1], seq_offsets=[0, 1, 2])
    >>> logits = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> token_kl(logits, torch.zeros(2, 2), table)
    tensor([0.0000, 0.1201])
    """
    how = _checked(direction, temperature, softcap, logit_scale)
    rows, ref_rows = (_rows(n, x) for n, x in (("logits", logits), ("ref_logits", ref_logits)))
    _check_pair("ref_logits", ref_rows, rows)
    check_table(table, rows, "logits")
    C = _chunk_rows(chunk_rows, rows.shape[1])
    return _TokenKL.apply(
        rows, ref_rows.detach(), table.logit_rows, table.targets, how, direction, C
    )


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    table: ScoreTable,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: str = "ref_policy",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """KL at each token from the hidden states and heads of both models; no (M, V) logits kept.

    Same as::

        token_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias, table, ...)

    but rows that are not scored reach neither product. 4MHV forward, 8MHV backward, which
    multiplies again.

    Args:
        hidden: (R, H) or (B, T, H); the policy's.
        weight: (V, H); ``bias`` (V,) or None.
        ref_hidden, ref_weight, ref_bias: the reference's, whose H may differ; without gradient.
        table, direction, temperature, softcap, logit_scale: as in `token_kl`.
        chunk_rows: as in `token_kl`.

    Returns:
        (M,) float32 (float64 for float64), differentiable once in ``hidden, weight, bias``.

    Raises:
        As `token_kl`; TensorError also for a DTensor.

    Numerics: as `token_kl`; logits are rounded to the dtype of the product, as a model's are; dW
    and db are added over chunks in float32.

    >>> table = ScoreTable(logit_rows=[0], targets=[1], seq_offsets=[0, 1], group_size=1)
    >>> hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [0.0]])
    >>> linear_token_kl(hidden, weight, hidden, torch.zeros(2, 1), table)
    tensor([0.1201])
    """
    how = _checked(direction, temperature, softcap, logit_scale)
    rows = check_head(hidden, weight, bias, table)
    ref_rows = check_head(ref_hidden, ref_weight, ref_bias, table)
    _check_pair("ref_weight", ref_weight[:, :0], weight[:, :0])
    if ref_rows.shape[0] != rows.shape[0]:
        raise TensorError(
            f"`ref_hidden` must have {rows.shape[0]} rows, as `hidden` has, found "
            f"{ref_rows.shape[0]}"
        )
    C = _chunk_rows(chunk_rows, weight.shape[0])
    head = make_head(rows, weight, how, C, "torch")
    ref_head = make_head(ref_rows, ref_weight, how, C, "torch")
    ref = (ref_rows.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach())
    return _LinearTokenKL.apply(
        rows, weight, bias, *ref, table.logit_rows, table.targets, head, ref_head, direction
    )


def _checked(
    direction: str, temperature: float, softcap: float | None, logit_scale: float
) -> Transform:
    if direction not in DIRECTIONS:
        raise ValueError(f"`direction` must be one of {DIRECTIONS}, found {direction!r}")
    return Transform.of(logit_scale, softcap, temperature)


def _rows(name: str, logits: Tensor) -> Tensor:
    """(R, V) view or copy."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, found {type(logits).__name__}")
    check_plain(name, logits)
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        found = f"{str(logits.dtype).removeprefix('torch.')} of shape {tuple(logits.shape)}"
        raise TensorError(
            f"`{name}` must be floating-point of shape (R, V) or (B, T, V), found {found}"
        )
    return logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])


def _check_pair(name: str, ref: Tensor, policy: Tensor) -> None:
    if ref.shape != policy.shape:
        raise TensorError(
            f"`{name}` must have shape {tuple(policy.shape)}, found {tuple(ref.shape)}"
        )
    if ref.device != policy.device:
        raise TensorError(f"`{name}` must be on {policy.device}, found {ref.device}")


def _chunk_rows(chunk_rows: int | None, V: int) -> int:
    if chunk_rows is None:
        return max(CHUNK_BYTES // (4 * max(V, 1)), 1)
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int):
        raise TypeError(f"`chunk_rows` must be an int or None, found {type(chunk_rows).__name__}")
    if chunk_rows < 1:
        raise ValueError(f"`chunk_rows` must be at least 1, found {chunk_rows}")
    return chunk_rows


def _log_softmax(y: Tensor) -> Tensor:
    """log p of each row; the largest logit is exact, and the sum is added in float64."""
    shifted = y - y.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True, dtype=torch.float64)
    return shifted - total.log().to(y.dtype)


def _sum(weight: Tensor, terms: Tensor) -> Tensor:
    """``sum_v w (...)`` in float64, where 0 of anything is 0."""
    return torch.where(weight > 0, weight * terms, 0.0).sum(-1, dtype=torch.float64)


def _forward(z: Tensor, ref_z: Tensor, scored: Tensor, how: Transform, direction: str) -> Tensor:
    """(C,) divergences of rows of raw logits."""
    log_p, log_q = (_log_softmax(twin.transform(x, *how)) for x in (z, ref_z))
    if direction == "ref_policy":
        kl = _sum(log_q.exp(), log_q - log_p)
    else:
        kl = _sum(log_p.exp(), log_p - log_q)
    return torch.where(scored, kl, 0.0).to(log_p.dtype)


def _gradient(
    z: Tensor, ref_z: Tensor, scored: Tensor, g: Tensor, how: Transform, direction: str
) -> Tensor:
    """(C, V) gradient with respect to the raw logits of the policy, in their dtype."""
    y = twin.transform(z, *how)
    log_p, log_q = _log_softmax(y), _log_softmax(twin.transform(ref_z, *how))
    p = log_p.exp()
    if direction == "ref_policy":
        dy = p - log_q.exp()
    else:
        excess = log_p - log_q
        kl = _sum(p, excess).to(p.dtype)
        dy = torch.where(p > 0, p * (excess - kl[:, None]), 0.0)
    # dy/dz = scale / T * (1 - (y T / cap)^2)
    slope = how.logit_scale / how.temperature
    if how.softcap:
        dy = dy * (1.0 - (y * (how.temperature / how.softcap)) ** 2)
    used = scored & (g != 0)
    return torch.where(used[:, None], dy * (slope * g)[:, None], 0.0).to(z.dtype)


def _pick(rows: Tensor, place: Tensor) -> Tensor:
    """Rows ``place`` of (R, V); a place of R is a row of zeros."""
    R = rows.shape[0]
    if not R:
        return rows.new_zeros(place.shape[0], rows.shape[1])
    picked = rows.index_select(0, place.clamp(max=R - 1))
    return picked.masked_fill_((place == R)[:, None], 0)


def _chunks(M: int, C: int) -> list[slice]:
    return [slice(start, min(start + C, M)) for start in range(0, M, C)]


def _places(logit_rows: Tensor, targets: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Row of each token, R where it has none, and whether it is scored.

    A scored row beyond R, which only a GPU can meet here, reads zeros and is answered by NaN.
    """
    scored = targets != IGNORE_INDEX
    exists = scored & (logit_rows >= 0) & (logit_rows < R)
    return torch.where(exists, logit_rows, R), scored


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        ref_rows: Tensor,
        logit_rows: Tensor,
        targets: Tensor,
        how: Transform,
        direction: str,
        C: int,
    ) -> Tensor:
        place, scored = _places(logit_rows, targets, rows.shape[0])
        out = torch.zeros(len(targets), dtype=_result(rows.dtype), device=rows.device)
        for part in _chunks(len(targets), C):
            z, ref_z = _pick(rows, place[part]), _pick(ref_rows, place[part])
            out[part] = _forward(z, ref_z, scored[part], how, direction)
        out[scored & (place == rows.shape[0])] = torch.nan
        ctx.save_for_backward(rows, ref_rows, place, scored)
        ctx.how, ctx.direction, ctx.C = how, direction, C
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, ref_rows, place, scored = ctx.saved_tensors
        with torch.no_grad():
            # one spare row takes what belongs nowhere
            grad = rows.new_zeros(rows.shape[0] + 1, rows.shape[1])
            for part in _chunks(len(place), ctx.C):
                z, ref_z = _pick(rows, place[part]), _pick(ref_rows, place[part])
                dz = _gradient(z, ref_z, scored[part], g[part], ctx.how, ctx.direction)
                grad.index_copy_(0, place[part], dz)
            grad = grad[: rows.shape[0]]
        return (differentiable_once(grad, g), *(None for _ in range(6)))


class _LinearTokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        logit_rows: Tensor,
        targets: Tensor,
        head: Head,
        ref_head: Head,
        direction: str,
    ) -> Tensor:
        out = torch.zeros(len(targets), dtype=_result(hidden.dtype), device=hidden.device)
        rows, scored = Rows.of(logit_rows, targets, hidden.shape[0]), targets != IGNORE_INDEX
        both = _Both(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, head, ref_head)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in head.chunks(len(targets)):
                _, z, ref_z = both.logits(part)
                out[part] = _forward(z, ref_z, scored[part], head.how, direction)
        out[scored & (rows.place == rows.height)] = torch.nan
        ctx.save_for_backward(
            hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows.place, targets
        )
        ctx.head, ctx.ref_head, ctx.direction = head, ref_head, direction
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *ref, place, targets = ctx.saved_tensors
        head: Head = ctx.head
        rows, scored = Rows(place, targets, hidden.shape[0]), targets != IGNORE_INDEX
        both = _Both(hidden, weight, bias, ref[0], ref[1], ref[2], rows, head, ctx.ref_head)
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        sums = wide(head.dtype)
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            dx = rows.new_gradient(hidden) if need_x else None
            dw = weight.new_zeros(weight.shape, dtype=sums) if need_w else None
            db = weight.new_zeros(weight.shape[0], dtype=sums) if need_b else None
            for part in head.chunks(len(targets)):
                x, z, ref_z = both.logits(part)
                dz = _gradient(z, ref_z, scored[part], g[part], head.how, ctx.direction)
                if dx is not None:
                    dx.index_copy_(0, place[part], product(dz, both.w).to(dx.dtype))
                if dw is not None:
                    add_product(dw, dz, x, first=part.start == 0)
                if db is not None:
                    db += dz.sum(0, dtype=sums)
        grads = (
            None if dx is None else dx[: rows.height],
            None if dw is None else dw.to(weight.dtype),
            None if db is None or bias is None else db.to(bias.dtype),
        )
        once = [None if d is None else differentiable_once(d, g) for d in grads]
        return (*once, *(None for _ in range(8)))


class _Both:
    """The logits of a chunk under the policy and under the reference."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        rows: Rows,
        head: Head,
        ref_head: Head,
    ) -> None:
        self._hidden, self._ref_hidden = hidden, ref_hidden
        self._rows, self._head, self._ref_head = rows, head, ref_head
        self.w, self._ref_w = weight.to(head.dtype), ref_weight.to(ref_head.dtype)
        self._b = None if bias is None else bias.to(head.dtype)
        self._ref_b = None if ref_bias is None else ref_bias.to(ref_head.dtype)
        M = len(rows.targets)
        self._scratch = head.scratch(self.w, M)
        self._ref_scratch = ref_head.scratch(self._ref_w, M)

    def logits(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden rows of the policy (C, H), its logits and the reference's (C, V)."""
        x = self._rows.gather(self._hidden, part, self._head.dtype)
        ref_x = self._rows.gather(self._ref_hidden, part, self._ref_head.dtype)
        z = self._head.logits(x, self.w, self._b, self._scratch)
        return x, z, self._ref_head.logits(ref_x, self._ref_w, self._ref_b, self._ref_scratch)


def _result(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
