"""What the calls return: the loss, and rewards and metrics made when they are read.

N pairs, examples or lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_ext import _core
from dpo_ext.errors import TensorError
from dpo_ext.torch.logps.ops import called_plainly
from dpo_ext.torch.losses.forms import Number, over, times
from dpo_ext.torch.losses.ranks import check_parts, sum_over

METRICS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
"""Of a `PreferenceLoss`: TRL's keys."""


class PreferenceLoss:
    """What `preference_loss` returns.

    Attributes:
        loss: scalar in the dtype of the log-probs, differentiable.
        per_pair: (N,), the loss of each pair before `weight`; differentiable unless the loss
            couples the batch.
        chosen_rewards, rejected_rewards: (N,) detached, ``beta * (log-prob - reference log-prob)``;
            without reference log-probs, and without a beta, the missing factor is left out.
            Computed when they are read.
        metrics: TRL's keys, each a detached scalar tensor, a mean over the N pairs (0 for none):
            ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies`` (strict: 0 at exact
            equality), ``rewards/margins``, ``logps/chosen``, ``logps/rejected``. Computed when it
            is read, without waiting for the device, of the numbers of the step: buffers that were
            filled again since change nothing.
        scale: what the rewards multiply log-ratios by: the beta of the loss, a float or (N,), or
            None.
        differentiable_logps: of `linear_preference_loss`, (N, 2): the log-probs with their
            gradient, for a term of your own beside the loss; else None.
        plan: that of the head which the loss came from (`linear_preference_loss`), else None.
    """

    __slots__ = (
        "_logps", "_ref_logps", "_scale", "differentiable_logps", "loss", "per_pair", "plan",
    )  # fmt: skip

    def __init__(
        self,
        loss: Tensor,
        per_pair: Tensor,
        logps: Tensor,
        ref_logps: Tensor | None,
        scale: Number | None,
    ) -> None:
        self.loss = loss
        self.per_pair = per_pair
        # copies: the caller may fill its buffers again before the metrics are read
        self._logps = logps.detach().clone()
        self._ref_logps = None if ref_logps is None else ref_logps.clone()
        self.scale = scale
        self.plan: str | None = None
        self.differentiable_logps: Tensor | None = None

    @property
    def chosen_rewards(self) -> Tensor:
        return self._rewards()[0]

    @property
    def rejected_rewards(self) -> Tensor:
        return self._rewards()[1]

    @property
    def scale(self) -> Number | None:
        return self._scale

    @scale.setter
    def scale(self, value: Number | None) -> None:
        self._scale = value.detach().clone() if isinstance(value, Tensor) else value

    @property
    def logps(self) -> Tensor:
        """(N, 2) detached, the log-probs that the loss was computed of."""
        return self._logps.detach()

    @property
    def metrics(self) -> dict[str, Tensor]:
        return dict(zip(METRICS, self._means().unbind(), strict=True))

    def _means(self) -> Tensor:
        """(6,), in the order of `METRICS`."""
        logps, ref_logps = self._logps, self._ref_logps
        scale = 1.0 if self.scale is None else self.scale
        plain = ref_logps is None or type(ref_logps) is Tensor
        if plain and not isinstance(scale, Tensor) and called_plainly(logps):
            beside = None if ref_logps is None else ref_logps.contiguous().numpy()
            return torch.from_numpy(_core.pair_means(logps.contiguous().numpy(), beside, scale))
        chosen, rejected = self._rewards()
        above = (chosen > rejected).to(logps.dtype)
        columns = torch.stack((chosen, rejected, above, chosen - rejected, *logps.unbind(1)))
        return over(columns.sum(1), float(max(logps.shape[0], 1)))

    def _rewards(self) -> tuple[Tensor, Tensor]:
        ratios = self._logps
        if self._ref_logps is not None:
            ratios = ratios - self._ref_logps
        chosen, rejected = ratios.unbind(1)
        scale = 1.0 if self.scale is None else self.scale
        return times(chosen, scale), times(rejected, scale)

    def __repr__(self) -> str:
        return f"PreferenceLoss(loss={self.loss!r}, {self.per_pair.shape[0]} pairs)"


@dataclass(frozen=True, slots=True)
class GroupLoss:
    """What `list_loss` returns, and `unpaired_loss` with more.

    Attributes:
        loss: scalar, differentiable.
        per_example: (N,) loss of each example or list before `weight`, differentiable.
        rewards: ``beta * (log-prob - reference log-prob)``, detached, in the shape of the
            log-probs.
    """

    loss: Tensor
    per_example: Tensor
    rewards: Tensor


@dataclass(frozen=True, slots=True)
class UnpairedLoss(GroupLoss):
    """What `unpaired_loss` returns: a `GroupLoss` with metrics.

    Attributes:
        logps: (N,) detached, the log-probs that the loss was computed of.
        labels: (N,) bool.
        z: the KL term of the loss, a scalar or (N,), or None where it has none.
    """

    logps: Tensor
    labels: Tensor
    z: Number | None

    @property
    def metrics(self) -> dict[str, Tensor]:
        """`metrics_over` of this rank alone."""
        return self.metrics_over("local")

    def metrics_over(
        self, group: Any = None, *, scores: Any = None, table: Any = None
    ) -> dict[str, Tensor]:
        """TRL's keys, each a detached scalar tensor: ``kl``, and the means of the desirable
        (``chosen``) and undesirable (``rejected``) examples, ``rewards/chosen``, ``logps/chosen``,
        ``rewards/rejected``, ``logps/rejected``, ``rewards/margins``; with ``scores`` the means of
        their tokens, too, ``logits/chosen``, ``logits/rejected`` and ``entropy``.

        A key whose examples are missing is left out, as in TRL, which waits for the device once.

        Args:
            group: process group whose ranks' examples are counted together; ``"local"``: of this
                rank alone.
            scores: `TokenScores` of the same batch with ``entropy`` and ``mean_logit``, as a model
                with `attach_scoring` gives them for ``score_stats=("entropy", "mean_logit")``.
            table: the batch's `ScoreTable`; needed with ``scores``.

        Raises:
            ValueError: there are several ranks and no ``group``, or one of ``scores`` and ``table``
                is missing.
            TensorError: ``scores`` have no entropy or no mean logits.
        """
        check_parts("`metrics_over`", "is a mean over the batch", group)
        masks = torch.stack((self.labels, ~self.labels))
        # Masks select: a log-prob of -inf on one side is nothing to the other.
        columns = torch.stack((self.rewards, self.logps)).double()
        totals = [_sums(columns, masks)]
        if (scores is None) != (table is None):
            raise ValueError("`scores` and `table` must both be given, or none")
        if scores is not None:
            totals.append(_sums(_token_columns(scores), _of_tokens(masks, table)))
        both = sum_over(torch.stack(totals), group)
        metrics = {} if self.z is None else {"kl": _scalar(self.z, self.logps)}
        counts = both[:, :, 2].tolist()
        kinds = (("rewards", "logps"), ("logits", None))
        for of, found, (one, other) in zip(both, counts, kinds, strict=False):
            for i, side in enumerate(("chosen", "rejected")):
                if found[i]:
                    means = (of[i, :2] / of[i, 2]).to(self.logps.dtype)
                    metrics[f"{one}/{side}"] = means[0]
                    if other is not None:
                        metrics[f"{other}/{side}"] = means[1]
        if all(counts[0]):
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        if len(both) > 1:
            tokens = both[1].sum(0)
            metrics["entropy"] = (tokens[1] / tokens[2].clamp(min=1)).to(self.logps.dtype)
        return metrics


def _sums(columns: Tensor, masks: Tensor) -> Tensor:
    """(2, 3): of each side the sums of two columns, and how many there are."""
    sums = torch.where(masks[:, None], columns, columns.new_zeros(())).sum(-1)
    return torch.cat((sums, masks.sum(-1, keepdim=True).double()), 1)


def _token_columns(scores: Any) -> Tensor:
    if scores.mean_logit is None or scores.entropy is None:
        raise TensorError(
            "`scores` must have `entropy` and `mean_logit`\n"
            'hint: score_stats=("entropy", "mean_logit")'
        )
    return torch.stack((scores.mean_logit, scores.entropy)).detach().double()


def _of_tokens(masks: Tensor, table: Any) -> Tensor:
    """(2, M): the side of each token's example."""
    lengths = table.lengths.reshape(-1)
    return masks.repeat_interleave(lengths, dim=1, output_size=len(table.targets))


def _scalar(value: Number, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(like.dtype).mean()
    return torch.full((), float(value), dtype=like.dtype, device=like.device)
