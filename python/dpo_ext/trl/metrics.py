"""TRL's metrics of a batch, as sums and counts. M scored tokens, S sequences, N pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.trl.collator import NUM_TOKENS, TABLE_KEY

STATS = ("entropy", "mean_logit", "is_top1")
"""What the head has to say of each token beside its log-prob."""


class NotANumber(NamedTuple):
    """What stands for the result of a loss that is no number."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def sums_of(inputs: Mapping[str, Any], scores: Any, out: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By TRL's names, a sum and the number of what was summed."""
    table, tokens, logps = inputs[TABLE_KEY], scores.tokens, scores.logps.detach()
    M, S = table.targets.numel(), table.n_sequences
    chosen = torch.arange(S, device=logps.device) % 2 == 0
    chosen = torch.repeat_interleave(chosen, table.lengths.flatten(), output_size=M)
    one = torch.ones((), device=logps.device)
    real = one * inputs[NUM_TOKENS] if NUM_TOKENS in inputs else inputs["attention_mask"].sum()
    pairs = one * len(logps)
    return {
        "entropy": (tokens.entropy.sum(), one * M),
        NUM_TOKENS: (real, one),
        "logits/chosen": (tokens.mean_logit[chosen].sum(), chosen.sum()),
        "logits/rejected": (tokens.mean_logit[~chosen].sum(), (~chosen).sum()),
        "mean_token_accuracy": (tokens.is_top1[chosen].sum(), chosen.sum()),
        "rewards/chosen": (out.chosen_rewards.sum(), pairs),
        "rewards/rejected": (out.rejected_rewards.sum(), pairs),
        "rewards/accuracies": ((out.chosen_rewards > out.rejected_rewards).sum(), pairs),
        "rewards/margins": ((out.chosen_rewards - out.rejected_rewards).sum(), pairs),
        "logps/chosen": (logps[:, 0].sum(), pairs),
        "logps/rejected": (logps[:, 1].sum(), pairs),
    }
