"""What losses of token statistics take from the scores of a table: LD-DPO's weights, WPO's
averages, TDPO's divergences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.layout.table import IGNORE_INDEX, ScoreTable
from dpo_ext.torch.logps import twin
from dpo_ext.torch.logps.scores import TokenScores
from dpo_ext.torch.numbers import as_number


def ld_table(table: ScoreTable, ld_alpha: float) -> ScoreTable:
    """The table whose log-probs are those of LD-DPO: ``head + ld_alpha * tail``.

    The first ``min(nw, nl)`` scored tokens of both completions of a pair are the head and keep
    their weight; the rest, of the longer one, is multiplied by ``ld_alpha``. `dpo` on such
    log-probs, of policy *and* reference, is LD-DPO (2409.06411). The lengths do not change, and
    nothing waits for the device.

    Args:
        table: of pairs.
        ld_alpha: in [0, 1]; 1 changes nothing.

    Returns:
        ScoreTable with weights.

    >>> table = ScoreTable(logit_rows=[0, 1, 2, 4], targets=[5, 6, 7, 8], seq_offsets=[0, 3, 4])
    >>> ld_table(table, 0.5).weights
    tensor([1.0000, 0.5000, 0.5000, 1.0000])
    """
    number = as_number("ld_alpha", ld_alpha)
    if not isinstance(number, (float, int)):
        raise TypeError(f"`ld_alpha` must be a number, found {describe(ld_alpha)}")
    ld_alpha = number
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"`ld_alpha` must be in [0, 1], found {ld_alpha!r}")
    if table.group_size != 2:
        raise TensorError(f"`table` must be of pairs, found groups of {table.group_size}")
    sequence, scored = _sequence_of_tokens(table)
    before = torch.cumsum(scored.long(), 0) - scored.long()
    start = torch.cat((before, scored.long().sum().reshape(1)))[table.seq_offsets[:-1].long()]
    place = before - start[sequence]
    head = table.lengths.reshape(-1, 2).amin(1).repeat_interleave(2)
    factor = torch.where(place < head[sequence], 1.0, float(ld_alpha))
    weights = factor if table.weights is None else factor * table.weights
    return table.with_weights(weights.to(torch.float32))


def wpo_averages(scores: TokenScores, table: ScoreTable) -> tuple[Tensor, Tensor]:
    """WPO's ``aw`` and ``al``: the mean over scored tokens of ``logp - log sum_v p_v^2``, detached.

    0 where the policy is as likely to write the completion as its own samples are; a completion
    without a scored token has 0. Zhou et al. 2024, arXiv:2406.11827, eq. 2.

    Args:
        scores: of ``token_scores(logits, table, stats=("log_sum_sq",))``.
        table: of pairs.

    Returns:
        Two tensors (N,), for ``preference_loss(..., loss="wpo", aw=aw, al=al)``.

    >>> from dpo_ext.torch import token_scores
    >>> table = ScoreTable(logit_rows=[0, 1], targets=[0, 1], seq_offsets=[0, 1, 2])
    >>> wpo_averages(token_scores(torch.zeros(2, 4), table, stats=("log_sum_sq",)), table)
    (tensor([0.]), tensor([0.]))
    """
    if scores.log_sum_sq is None:
        raise ValueError(
            '`scores` must have `log_sum_sq`\nhint: token_scores(..., stats=("log_sum_sq",))'
        )
    if table.group_size != 2:
        raise TensorError(f"`table` must be of pairs, found groups of {table.group_size}")
    sequence, scored = _sequence_of_tokens(table)
    excess = torch.where(scored, scores.logps.detach() - scores.log_sum_sq, 0.0).double()
    total = torch.zeros(table.n_sequences, dtype=torch.float64, device=excess.device)
    total = total.index_add(0, sequence, excess)
    mean = total / table.lengths.reshape(-1).clamp(min=1)
    aw, al = mean.reshape(-1, 2).to(scores.logps.dtype).unbind(1)
    return aw, al


def tdpo_kls(kl: Tensor, table: ScoreTable) -> tuple[Tensor, Tensor]:
    """TDPO's ``kw`` and ``kl``: the divergences of a completion's tokens, added up, of both sides.

    Zeng et al. 2024, arXiv:2404.11999, eq. 11: ``sum_t KL(ref_t, policy_t)``. The loss is
    differentiable through them.

    Args:
        kl: (M,), of ``token_kl(logits, ref_logits, table)``.
        table: of pairs; its weights are applied.

    Returns:
        Two tensors (N,), for ``preference_loss(..., loss="tdpo1", kw=kw, kl=kl)``, or
        ``loss="tdpo2"``, whose formula stops the gradient of the first: ``kw=kw.detach()``.

    >>> from dpo_ext.torch import token_kl
    >>> table = ScoreTable(logit_rows=[0, 1], targets=[0, 1], seq_offsets=[0, 1, 2])
    >>> logits = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> tdpo_kls(token_kl(logits, torch.zeros(2, 2), table), table)
    (tensor([0.]), tensor([0.1201]))
    """
    if table.group_size != 2:
        raise TensorError(f"`table` must be of pairs, found groups of {table.group_size}")
    if kl.shape != table.targets.shape:
        raise TensorError(
            f"`kl` must have shape ({len(table.targets)},), one value a token, found {describe(kl)}"
        )
    kw, other = twin.segment_sum(kl, table.weights, table.seq_offsets).reshape(-1, 2).unbind(1)
    return kw, other


def _sequence_of_tokens(table: ScoreTable) -> tuple[Tensor, Tensor]:
    """(M,) the sequence of each token, and whether it is scored."""
    tokens = torch.arange(len(table.targets), device=table.targets.device)
    sequence = torch.bucketize(tokens, table.seq_offsets[1:].long(), right=True)
    return sequence, table.targets != IGNORE_INDEX
