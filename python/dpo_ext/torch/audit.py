"""The audit of the first step: a policy that is its own reference must have its log-probs.

Then every log-ratio is 0, and a loss has its value at margin 0: log 2 for ``"dpo"``. What a wrong
cache, a dropout or another truncation does to it is small, silent and in every step that follows.

N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_ext.errors import RefLogpsError, describe

ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.005}
"""Nats, times the square root of the scored tokens; 0.19 was measured in bfloat16 at 250."""
SMALL, RELATIVE = 1e-3, 1e-6
"""Of float32 and float64: nats, or a part of the log-prob, whichever is more."""
OF_OTHER_BATCHES = 3.0
"""A packed row beside a padded one, of 18 tokens in bfloat16: 0.12 nats, 1.4 times the above."""
BETA = 0.1
USUAL = (
    "dropout (attention's, LoRA's, NEFTune's noise) in one of the passes; another dtype, or "
    "autocast in one of them; another attention implementation; an adapter that was not off, or "
    "does more than can be switched off (`modules_to_save`, embeddings, PiSSA); another "
    "`max_length`, template or token weights; a cache of another run, or in another order"
)
HINT = "audit=False goes on, where the policy is not meant to be its reference"
MOST = 0.9
"""The share of a batch's sequences that makes a pattern."""
Causes = Callable[["Drift"], Iterable[str]]


class Drift(NamedTuple):
    """Log-probs of policy and reference, (N, 2), that should be one."""

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor
    """Scored tokens of each sequence."""
    dtype: torch.dtype
    """That the models compute in."""
    slack: float = 1.0

    @property
    def off(self) -> Tensor:
        """(N, 2) nats."""
        return (self.logps - self.ref_logps).abs()

    @property
    def allowed(self) -> Tensor:
        """(N, 2) nats that the dtype explains."""
        return self.slack * allowed(self.logps, self.lengths, self.dtype)

    @property
    def wrong(self) -> Tensor:
        """(N, 2) bool: more than that. A log-prob that is no number is the loss's to tell."""
        return self.off > self.allowed


def _rounds_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype that rounds as products of ``dtype`` do: those of float32 may go through bfloat16,
    or through TF32, which has the digits of float16.
    """
    if dtype != torch.float32:
        return dtype
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the names of torch 2.9 and later
        precision = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
    return {"high": torch.float16, "medium": torch.bfloat16}.get(precision, dtype)


def allowed(logps: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Nats that two forward passes of one model on one batch may differ by.

    >>> allowed(torch.tensor([-300.0]), torch.tensor([100]), torch.bfloat16)
    tensor([0.2000])
    """
    dtype = _rounds_as(dtype)
    if dtype in ROUNDING:
        return ROUNDING[dtype] * lengths.to(logps.dtype).sqrt()
    return (RELATIVE * logps.abs()).clamp(min=SMALL)


def audit_first_step(
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    *,
    dtype: torch.dtype,
    slack: float = 1.0,
    causes: Causes | None = None,
    any_rank: Callable[[bool], bool] = bool,
) -> None:
    """Refuses a first step in which a policy that is its own reference has other log-probs.

    Same as::

        budget = 0.02 * sqrt(lengths) if dtype is bfloat16 else 1e-3
        assert ((logps - ref_logps).abs() <= budget).all()

    Args:
        logps, ref_logps: (N, 2) log-probs of the pairs of the first step, dropout off.
        lengths: (N, 2) scored tokens.
        dtype: that the model computes in: autocast's, or that of its weights.
        slack: a factor of what the dtype allows, `OF_OTHER_BATCHES` where the reference's were
            computed in batches of another shape or layout, whose rounding differs.
        causes: called where they differ, gives sentences on what was measured, the likeliest
            first. What the numbers alone show is told in any case.
        any_rank: from this rank's verdict to that of all, so that no rank goes on alone.

    Raises:
        RefLogpsError: they differ by more than the dtype explains; the message has by how much,
            the loss of DPO beside log 2, and what was found, or else the usual causes.

    >>> logps, ref = torch.tensor([[-40.0, -50.0]]), torch.tensor([[-40.0, -50.0]])
    >>> audit_first_step(logps, ref, torch.tensor([[9, 12]]), dtype=torch.float32)
    >>> audit_first_step(logps, ref.flip(1), torch.tensor([[9, 12]]), dtype=torch.float32)
    Traceback (most recent call last):
    dpo_ext.errors.RefLogpsError: the policy is its own reference at the first step, and 2 of 2 ...
    """
    with torch.no_grad():
        drift = Drift(logps.detach().double(), ref_logps.double(), lengths, dtype, slack)
        wrong = drift.wrong
        if not any_rank(bool(wrong.any())):
            return
        found = [*_patterns(drift), *(() if causes is None else causes(drift))]
    lines = [f"the policy is its own reference at the first step, and {_said(drift)}"]
    lines += [f"found: {cause}" for cause in found] or [f"usual causes: {USUAL}"]
    lines.append(f"hint: {HINT}")
    raise RefLogpsError("\n".join(lines))


def _said(drift: Drift) -> str:
    """The worst sequence, and what becomes of the loss."""
    wrong = drift.wrong
    if not bool(wrong.any()):
        return "on another rank has other log-probs than it"
    pair, side = divmod(int((drift.off - drift.allowed).nan_to_num(-torch.inf).argmax()), 2)
    values = f"{drift.logps[pair, side]:.4f} and {drift.ref_logps[pair, side]:.4f}"
    ratios = drift.logps - drift.ref_logps
    loss = -nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).nanmean()
    return (
        f"{int(wrong.sum())} of {wrong.numel()} sequences have other log-probs: pair {pair}, "
        f"{('chosen', 'rejected')[side]}: {values}, {drift.off[pair, side]:.3g} nats where "
        f"{describe(drift.dtype)} explains {drift.allowed[pair, side]:.2g}; DPO's loss would be "
        f"{loss:.4f} in place of 0.6931 (beta {BETA})"
    )


def _patterns(drift: Drift) -> Iterator[str]:
    """What the numbers alone tell."""
    logps, ref, lengths, wrong = drift.logps, drift.ref_logps, drift.lengths, drift.wrong

    def most_are(other: Tensor) -> bool:
        close = (logps - other).abs() <= drift.allowed
        return bool(wrong.any()) and float(close[wrong].double().mean()) >= MOST

    if most_are(ref.flip(1)):
        yield "chosen and rejected are swapped in the reference"
        return
    if most_are(ref * lengths):
        yield "the reference holds means over tokens, not sums"
        return
    # Where each sequence finds another one's value, whose place is it?
    N = logps.shape[0]
    if N > 2 and any(most_are(ref.roll(shift, 0)) for shift in range(1, N)):
        yield "the reference's rows are those of other pairs of the batch: its order is another"
        return
    short = ~wrong & (lengths > 0)
    far = bool((drift.off > 3 * drift.allowed)[wrong].all())  # rounding is more in long ones, too
    both = bool(wrong.any()) and bool(short.any())
    if both and far and lengths[wrong].min() >= lengths[short].max():
        longest = int(lengths[wrong].min())
        yield (
            f"only sequences of {longest} scored tokens or more are off: the reference was cut at "
            "another `max_length`, or keeps another end"
        )
    none = (ref == 0) & (lengths > 0)
    if bool(none.any()):
        yield f"the reference has log-prob 0 for {int(none.sum())} sequences: it never scored them"


def causes_of(policy: nn.Module, reference: nn.Module | None) -> Iterator[str]:
    """What two models, or one with itself, tell of why their log-probs differ."""
    dropout = sorted(
        {
            type(part).__name__ + f" {part.p:g}"
            for part in policy.modules()
            if part.training and isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0  # noqa: SLF001
        }
    )
    if dropout:
        yield f"dropout is on in the policy: {', '.join(dropout)}"
    if reference is None:
        return
    if any(part.training for part in reference.modules()):
        yield "the reference is in training mode"
    kinds = [_dtypes(model) for model in (policy, reference)]
    if kinds[0] != kinds[1]:
        yield f"the weights are {kinds[0]} in the policy and {kinds[1]} in the reference"
    attention = [_attention(model) for model in (policy, reference)]
    if attention[0] != attention[1]:
        yield f"the attention is {attention[0]} in the policy and {attention[1]} in the reference"


def _dtypes(model: nn.Module) -> str:
    found = {describe(p.dtype) for p in model.parameters() if p.is_floating_point()}
    return " and ".join(sorted(found))


def _attention(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))


def in_eval_mode(model: nn.Module, score: Callable[[], Tensor]) -> Tensor:
    """``score()`` of a model that draws nothing, without gradient; its modes are as before."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return score()
    finally:
        for part, training in modes:
            part.training = training


def first_difference(policy: nn.Module, reference: nn.Module) -> str | None:
    """The name of the first weight that two models do not share, or None: a reference with other
    weights is another model, of which nothing follows for the first step.

    A weight that one of them holds in fewer bits is compared in these.
    """
    theirs = dict(reference.named_parameters())
    for name, weight in policy.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != weight.shape:
            return name
        if weight.is_meta or other.is_meta:  # offloaded: nothing to compare here
            continue
        low = min(weight.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        ours, its = _local(weight), _local(other)
        if ours.shape != its.shape or not torch.equal(ours.to(its.device, low), its.to(low)):
            return name
    return None


def _local(weight: Any) -> Tensor:
    """This rank's part of a weight."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part.detach()
