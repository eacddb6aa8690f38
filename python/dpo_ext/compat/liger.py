"""Liger's chunked preference losses with the head inside (``liger_kernel.chunked_loss``), 0.5 on.

N pairs, B = 2N rows, chosen first; T columns, H hidden, V vocabulary. The modules take what
Liger's take, in its order, and give ``(loss, values)``: the loss with a gradient, the rest without.

Common to all. ``target`` (B, T) stands where it is predicted: the caller shifts. ``ignore_index``
is not scored. ``compiled`` and ``chunk_size`` are accepted and change nothing: the kernels need no
compiler, and a chunk holds as many scored rows as keep its logits within 1.1 GB. Values are float32
for every dtype, as Liger's. Logits are rounded to the dtype of the product, as Liger's; the
weight's gradient is added over chunks in float32, where Liger adds in the weight's own dtype. Only
scored rows are multiplied and read, so NaN in a hidden state of padding stays there; Liger's
spreads. The means and sums of logits are over all rows and columns, padding included: Liger's, and
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpo_ext.compat.parts.heads import Head, check_head, logit_total, per_row, token_grid
from dpo_ext.compat.parts.margins import pair_losses, smoothed
from dpo_ext.compat.parts.paired import mean, pair_logps, reference_logps

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]


class LigerFusedLinearDPOLoss(nn.Module):
    """DPO and nine more losses of pairs from hidden states.

    Same as Liger's::

        logps = log_softmax(_input @ lin_weight.T + bias, -1)[..., target] summed over a row
        loss = alpha * nll + preference(logps, those of the reference).sum() / N

    with ``nll`` the mean over all chosen tokens of the batch, or 0. Formulas by ``loss_type``: the
    rows ``dpo`` (sigmoid; arXiv:2305.18290, eq. 7), ``hinge``, ``exo_pair``, ``nca_pair``,
    ``robust``, ``bco_pair`` (delta 0), ``sppo_hard``, ``apo_zero``, ``apo_down``, ``discopop`` of
    docs/losses. Kept as Liger's: ``label_smoothing`` is ignored by ``sigmoid``; ``bco_pair`` keeps
    no running delta; ``ipo`` is refused.

    Args:
        ignore_index: the target that is not scored.
        beta: strength; alpha: factor of the NLL; compute_nll_loss: whether there is one.
        use_ref_model: False takes 0 for the reference.
        average_log_prob: averages over the scored tokens in place of sums; NaN for none.
        loss_type, label_smoothing, discopop_tau: see above.
        compiled, chunk_size: see the head of this module.

    ``forward(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias)``: (V, H),
    (B, T, H), (B, T), (V,) and those of the reference. Gives ``(loss, (chosen_logps,
    rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
    rejected_rewards))``.

    Raises:
        ValueError: ``loss_type``, or ``label_smoothing`` outside its domain.  TensorError: shapes,
            dtypes, an odd number of rows, a missing reference; on the CPU an id outside [0, V).

    Numerics: see the head of this module.

    >>> x, w, target = torch.zeros(2, 2, 8), torch.zeros(4, 8), torch.tensor([[1, 2], [3, -100]])
    >>> loss, values = LigerFusedLinearDPOLoss()(w, x, target, None, x, w)
    >>> loss, values[0]
    (tensor(0.6931), tensor([-2.7726]))
    """

    _SUPPORTED_LOSS_TYPES = (
        "sigmoid",
        "hinge",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
    )

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        if loss_type not in self._SUPPORTED_LOSS_TYPES:
            names = ", ".join(self._SUPPORTED_LOSS_TYPES)
            raise ValueError(f"`loss_type` must be one of {names}, found {loss_type!r}")
        if loss_type == "exo_pair" and label_smoothing <= 0.0:
            raise ValueError(f"`label_smoothing` must be > 0 for exo_pair, found {label_smoothing}")
        if loss_type == "robust" and not 0.0 <= label_smoothing < 0.5:
            raise ValueError(
                f"`label_smoothing` must be in [0, 0.5) for robust, found {label_smoothing}"
            )

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        average = self.average_log_prob
        head = Head(_input, lin_weight, bias)
        own = pair_logps(
            head, target, self.ignore_index, average=average, nll=self.compute_nll_loss
        )
        N, zero = len(own.chosen), torch.zeros_like(own.chosen.detach())
        ref = (zero, zero)
        if self.use_ref_model:
            theirs = Head(ref_input, ref_weight, ref_bias)  # type: ignore[arg-type]
            logps = reference_logps(theirs, target, self.ignore_index, average).to(zero.dtype)
            ref = (logps[:N], logps[N:])
        name = "dpo" if self.loss_type == "sigmoid" else self.loss_type
        params: dict[str, float] = {"beta": self.beta}
        if name in ("exo_pair", "robust"):
            params["label_smoothing"] = self.label_smoothing
        if name == "discopop":
            params["tau"] = self.discopop_tau
        if name == "bco_pair":
            params["delta"] = 0.0
        losses = pair_losses((own.chosen, own.rejected), ref, name, **params)
        loss = self.alpha * own.nll + mean(losses)
        rewards = (self.beta * (own.chosen - ref[0]), self.beta * (own.rejected - ref[1]))
        return loss.float(), own.values(*rewards)


class LigerFusedLinearCPOLoss(nn.Module):
    """CPO from hidden states, with its NLL.

    Same as Liger's, ``u = beta * (chosen_logps - rejected_logps)``::

        loss = alpha * nll + ((1 - label_smoothing) * -logsigmoid(u)
                              + label_smoothing * -logsigmoid(-u)).sum() / N

    arXiv:2401.08417, eq. 3. Kept as Liger's: the NLL is the mean over all chosen tokens of the
    batch, where the paper's is a mean of each answer's own.

    Args:
        As `LigerFusedLinearDPOLoss`; ``compute_nll_loss`` is True by default.

    ``forward(lin_weight, _input, target, bias)`` gives ``(loss, (chosen_logps, rejected_logps,
    chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards))``.

    >>> x, w = torch.zeros(2, 2, 8), torch.zeros(4, 8)
    >>> LigerFusedLinearCPOLoss()(w, x, torch.tensor([[1, 2], [3, 1]]))[0]
    tensor(2.0794)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = pair_logps(
            Head(_input, lin_weight, bias),
            target,
            self.ignore_index,
            average=self.average_log_prob,
            nll=self.compute_nll_loss,
        )
        losses = smoothed(
            (own.chosen, own.rejected),
            (0.0, 0.0),
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        loss = self.alpha * own.nll + mean(losses)
        return loss.float(), own.values(self.beta * own.chosen, self.beta * own.rejected)


class LigerFusedLinearSimPOLoss(nn.Module):
    """SimPO from hidden states, of averages, with an NLL.

    Same as Liger's, ``u = beta * (chosen_logps - rejected_logps) - gamma``::

        loss = alpha * nll + ((1 - label_smoothing) * -logsigmoid(u)
                              + label_smoothing * -logsigmoid(-u)).sum() / N

    arXiv:2405.14734. Kept as Liger's: ``gamma`` is absolute (not a multiple of beta), and the
    module adds the NLL by default, which the paper has not.

    Args:
        As `LigerFusedLinearCPOLoss`, without ``average_log_prob``, and ``gamma``, the margin.

    ``forward(lin_weight, _input, target, bias)`` gives what `LigerFusedLinearCPOLoss` does.

    >>> x, w = torch.zeros(2, 2, 8), torch.zeros(4, 8)
    >>> LigerFusedLinearSimPOLoss(compute_nll_loss=False)(w, x, torch.tensor([[1, 2], [3, 1]]))[0]
    tensor(0.9741)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.gamma = gamma
        self.chunk_size = chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        head = Head(_input, lin_weight, bias)
        own = pair_logps(head, target, self.ignore_index, average=True, nll=self.compute_nll_loss)
        margin = self.beta * (own.chosen - own.rejected) - self.gamma
        losses = smoothed(
            (margin, torch.zeros_like(margin)),
            (0.0, 0.0),
            beta=1.0,
            label_smoothing=self.label_smoothing,
        )
        loss = self.alpha * own.nll + mean(losses)
        return loss.float(), own.values(self.beta * own.chosen, self.beta * own.rejected)


class LigerFusedLinearORPOLoss(nn.Module):
    """ORPO from hidden states, of averages, with its NLL.

    Same as Liger's, ``lo(a) = a - log(1 - exp(a))``::

        log_odds = lo(chosen_logps) - lo(rejected_logps)
        loss = nll - beta * logsigmoid(log_odds).sum() / N

    arXiv:2403.07691, eq. 4 and 7. Kept as Liger's: a side of probability 1 has a gradient of NaN;
    the NLL is the mean over the batch's chosen tokens (those of ``nll_target``, if given).

    Args:
        As `LigerFusedLinearDPOLoss`.

    ``forward(lin_weight, _input, target, bias, nll_target)``: ``nll_target`` (B, T) are the labels
    of the NLL, of whose rows the chosen ones are read. Gives ``(loss, (chosen_logps,
    rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
    rejected_rewards, log_odds_ratio, log_odds_chosen))``.

    Numerics: ``log(1 - exp(a))`` keeps its digits near ``a = 0``, where Liger's loses them.

    >>> x, w = torch.zeros(2, 2, 8), torch.zeros(4, 8)
    >>> LigerFusedLinearORPOLoss()(w, x, torch.tensor([[1, 2], [3, 1]]))[0]
    tensor(1.4556)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = pair_logps(
            Head(_input, lin_weight, bias),
            target,
            self.ignore_index,
            average=True,
            nll=self.compute_nll_loss,
            nll_target=nll_target,
        )
        c, r = own.chosen, own.rejected
        log_odds = (c - r) - ((-c.expm1()).log() - (-r.expm1()).log())
        ratio = nn.functional.logsigmoid(log_odds)
        loss = own.nll - self.beta * mean(ratio)
        more = (self.beta * c, self.beta * r, mean(ratio), mean(log_odds))
        return loss.float(), own.values(*more)


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO of single completions from hidden states.

    Same as Liger's, ``x = logps - ref_logps``, B completions::

        sign = where(preference_labels, 1, -1)
        loss = (1 - sigmoid(beta * (x - kl) * sign)).sum() / B

    arXiv:2402.01306, eq. 7, with both weights 1. Kept as Liger's: no ``lam_d, lam_u``. Liger before
    0.8 returned wrong sums of log-probs, logits and rewards for a ``chunk_size`` above 1 (each row
    times each label); these are those of 0.8.

    Args:
        As `LigerFusedLinearDPOLoss`; ``use_ref_model`` is False by default.

    ``forward(_input, lin_weight, target, bias, preference_labels, ref_input, ref_weight, ref_bias,
    kl)``: labels (B,) bool, True desirable; ``kl`` a scalar, (1,) or (B,), without gradient, 0 if
    None. Gives ``(loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum,
    rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum))``.

    Raises:
        AssertionError: no ``preference_labels``.  TensorError: as `LigerFusedLinearDPOLoss`.

    >>> x, w, labels = torch.zeros(2, 2, 8), torch.zeros(4, 8), torch.tensor([True, False])
    >>> target = torch.tensor([[1, 2], [3, 1]])
    >>> LigerFusedLinearKTOLoss(use_ref_model=True)(x, w, target, None, labels, x, w)[0]
    tensor(0.5000)
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if preference_labels is None:
            raise AssertionError("`preference_labels` is missing: which completions are desirable")
        head, average = Head(_input, lin_weight, bias), self.average_log_prob
        check_head(_input, lin_weight, target)
        good, scored = preference_labels.bool(), target != self.ignore_index
        logps = per_row(token_grid(*head, target, scored), scored, average)
        x = logps
        if self.use_ref_model:
            theirs = Head(ref_input, ref_weight, ref_bias)  # type: ignore[arg-type]
            x = x - reference_logps(theirs, target, self.ignore_index, average).to(x.dtype)
        shifted = x if kl is None else x - kl.detach()
        losses = torch.sigmoid(-self.beta * torch.where(good, shifted, -shifted))
        both = (logps.detach(), self.beta * x.detach())
        sums = [torch.where(side, v, 0.0).sum() for v in both for side in (good, ~good)]
        logits = [logit_total(*head, side) for side in (good, ~good)]
        values = (*sums[:2], *logits, *sums[2:])
        return mean(losses).float(), tuple(value.float() for value in values)
