"""KL divergence of whole rows between a policy and its reference, chunk by chunk.

Letters: R rows of logits, H hidden, V vocabulary, M tokens of the table, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable
from dpo_ext.torch.logps import twin
from dpo_ext.torch.logps.head import (
    Head,
    HeadOptions,
    Linear,
    Rows,
    Work,
    check_chunk_rows,
)
from dpo_ext.torch.logps.products import add_product, product, wide
from dpo_ext.torch.logps.scores import (
    Transform,
    check_is_table,
    check_plain,
    check_table,
    without_autocast,
)
from dpo_ext.torch.once import differentiable_once, node, one_by_one

Direction = Literal["ref_policy", "policy_ref"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
CHUNK_BYTES = 64 << 20
"""Default bound of one chunk of float32 logits; a call has about six such buffers at a time."""


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    table: ScoreTable,
    *,
    direction: Direction = "ref_policy",
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
    check_is_table(table)
    check_table(table, logits, "logits")
    check_table(table, ref_logits, "ref_logits")
    C = check_chunk_rows(chunk_rows, 4 * rows.shape[1], CHUNK_BYTES)
    kl = _Divergence(direction, Head(how, False, rows.dtype, C))
    places = Rows.of(table.logit_rows, table.targets, rows.shape[0])
    return node(_TokenKL, rows, ref_rows.detach(), places, kl)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    table: ScoreTable,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    direction: Direction = "ref_policy",
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
    check_is_table(table)
    policy = Linear.of(hidden, weight, bias, table, reads_targets=False)
    ref = Linear.of(
        ref_hidden, ref_weight, ref_bias, table, called="ref_hidden", reads_targets=False
    ).detached()
    _check_pair("ref_weight", ref_weight[:, :0], weight[:, :0])
    (R, _), ref_R = policy.hidden.shape, ref.hidden.shape[0]
    if ref_R != R:
        raise TensorError(f"`ref_hidden` must have {R} rows, as `hidden` has, found {ref_R}")
    C = check_chunk_rows(chunk_rows, 4 * weight.shape[0], CHUNK_BYTES)
    options = HeadOptions(how, "torch", C)
    kl = _Divergence(direction, Head.of(policy, options))
    places = Rows.of(table.logit_rows, table.targets, R)
    return node(_LinearTokenKL, *policy, places, _Reference(kl, ref, Head.of(ref, options)))


def _checked(
    direction: str, temperature: float, softcap: float | None, logit_scale: float
) -> Transform:
    if direction not in DIRECTIONS:
        raise ValueError(f"`direction` must be one of {DIRECTIONS}, found {direction!r}")
    return Transform.of(logit_scale, softcap, temperature)


def _rows(name: str, logits: Tensor) -> Tensor:
    """(R, V) view or copy."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, found {describe(logits)}")
    check_plain(name, logits)
    if logits.dim() not in (2, 3) or not logits.is_floating_point():
        raise TensorError(
            f"`{name}` must be floating-point of shape (R, V) or (B, T, V), found "
            f"{describe(logits)}"
        )
    return logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])


def _check_pair(name: str, ref: Tensor, policy: Tensor) -> None:
    if ref.shape != policy.shape:
        raise TensorError(
            f"`{name}` must have shape {tuple(policy.shape)}, found {tuple(ref.shape)}"
        )
    if ref.device != policy.device:
        raise TensorError(f"`{name}` must be on {policy.device}, found {ref.device}")


def _log_softmax(y: Tensor) -> Tensor:
    """log p of each row; the largest logit is exact, and the sum is added in float64."""
    shifted = y - y.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True, dtype=torch.float64)
    return shifted - total.log().to(y.dtype)


def _sum(weight: Tensor, terms: Tensor) -> Tensor:
    """``sum_v w (...)`` in float64, where 0 of anything is 0."""
    return torch.where(weight > 0, weight * terms, 0.0).sum(-1, dtype=torch.float64)


class _Divergence(NamedTuple):
    """Which of the two divergences, of logits as ``head`` transforms and cuts them."""

    direction: Direction
    head: Head

    def of(self, z: Tensor, ref_z: Tensor, scored: Tensor) -> Tensor:
        """(C,) divergences of rows of raw logits."""
        log_p, log_q = (_log_softmax(twin.transform(x, *self.head.how)) for x in (z, ref_z))
        if self.direction == "ref_policy":
            kl = _sum(log_q.exp(), log_q - log_p)
        else:
            kl = _sum(log_p.exp(), log_p - log_q)
        return torch.where(scored, kl, 0.0).to(log_p.dtype)

    def gradient(self, z: Tensor, ref_z: Tensor, scored: Tensor, g: Tensor) -> Tensor:
        """(C, V) gradient with respect to the raw logits of the policy, in their dtype."""
        how = self.head.how
        y = twin.transform(z, *how)
        log_p, log_q = _log_softmax(y), _log_softmax(twin.transform(ref_z, *how))
        p = log_p.exp()
        if self.direction == "ref_policy":
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


class _Reference(NamedTuple):
    """What the reference brings to a divergence of two heads."""

    kl: _Divergence
    linear: Linear
    head: Head


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, ref_logits: Tensor, rows: Rows, kl: _Divergence) -> Tensor:
        scored = rows.targets != IGNORE_INDEX
        out = logits.new_zeros(len(scored), dtype=wide(logits.dtype))
        for part in kl.head.chunks(len(scored)):
            z, ref_z = (rows.gather(x, part, x.dtype) for x in (logits, ref_logits))
            out[part] = kl.of(z, ref_z, scored[part])
        # A row beyond R, which only a GPU can meet here.
        out[scored & (rows.place == rows.height)] = torch.nan
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ref_logits, rows, ctx.kl = inputs
        ctx.save_for_backward(logits, ref_logits, rows.place, rows.targets)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, ref_logits, place, targets = ctx.saved_tensors
        rows, scored = Rows(place, targets, logits.shape[0]), targets != IGNORE_INDEX

        def gradients(g: Tensor) -> tuple[Tensor]:
            grad = rows.new_gradient(logits)
            for part in ctx.kl.head.chunks(len(place)):
                z, ref_z = (rows.gather(x, part, x.dtype) for x in (logits, ref_logits))
                dz = ctx.kl.gradient(z, ref_z, scored[part], g[part])
                grad.index_copy_(0, place[part], dz)
            return (grad[: rows.height],)

        with torch.no_grad():
            (grad,) = one_by_one(gradients, g)
        return (differentiable_once(grad, g), None, None, None)


class _LinearTokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, ref: _Reference
    ) -> Tensor:
        scored, kl = rows.targets != IGNORE_INDEX, ref.kl
        out = hidden.new_zeros(len(scored), dtype=wide(hidden.dtype))
        with without_autocast(hidden.device):
            both = _Both.of(Linear(hidden, weight, bias), rows, ref)
            for part in kl.head.chunks(len(scored)):
                _, z, ref_z = both.logits(part)
                out[part] = kl.of(z, ref_z, scored[part])
        out[scored & (rows.place == rows.height)] = torch.nan
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, bias, rows, ref = inputs
        ctx.save_for_backward(hidden, weight, bias, *ref.linear, rows.place, rows.targets)
        ctx.kl, ctx.ref_head = ref.kl, ref.head

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *linear, place, targets = ctx.saved_tensors
        kl: _Divergence = ctx.kl
        rows, scored = Rows(place, targets, hidden.shape[0]), targets != IGNORE_INDEX
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        sums = wide(kl.head.dtype)

        def gradients(g: Tensor) -> tuple[Tensor | None, ...]:
            ref = _Reference(kl, Linear(*linear), ctx.ref_head)
            both = _Both.of(Linear(hidden, weight, bias), rows, ref)
            dx = rows.new_gradient(hidden) if need_x else None
            dw = weight.new_zeros(weight.shape, dtype=sums) if need_w else None
            db = weight.new_zeros(weight.shape[0], dtype=sums) if need_b else None
            for part in kl.head.chunks(len(targets)):
                x, z, ref_z = both.logits(part)
                dz = kl.gradient(z, ref_z, scored[part], g[part])
                if dx is not None:
                    dx.index_copy_(0, place[part], product(dz, both.policy.weight).to(dx.dtype))
                if dw is not None:
                    add_product(dw, dz, x, first=part.start == 0)
                if db is not None:
                    db += dz.sum(0, dtype=sums)
            return (
                None if dx is None else dx[: rows.height],
                None if dw is None else dw.to(weight.dtype),
                None if db is None or bias is None else db.to(bias.dtype),
            )

        with torch.no_grad(), without_autocast(g.device):
            grads = one_by_one(gradients, g)
        once = [None if d is None else differentiable_once(d, g) for d in grads]
        return (*once, None, None)


class _Both(NamedTuple):
    """The policy's head and the reference's on the same rows."""

    policy: Work
    reference: Work

    @staticmethod
    def of(policy: Linear, rows: Rows, ref: _Reference) -> _Both:
        return _Both(Work.of(policy, rows, ref.kl.head), Work.of(ref.linear, rows, ref.head))

    def logits(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden rows of the policy (C, H), its logits and the reference's (C, V)."""
        x = self.policy.gather(part)
        z, ref_z = self.policy.logits(x), self.reference.logits(self.reference.gather(part))
        return x, z, ref_z
