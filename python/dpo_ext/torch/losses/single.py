"""Losses of single labelled completions: KTO, BCO, APO.

As in the table of pairs the gradients are in closed form. N examples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.torch.losses.checks import (
    bind_parameters,
    check_count,
    check_is_number,
    check_pair_of,
    check_weight,
)
from dpo_ext.torch.losses.forms import ds, s, sp
from dpo_ext.torch.losses.node import attach, weighted_sum
from dpo_ext.torch.losses.ranks import check_group, check_parts, mean_over
from dpo_ext.torch.losses.result import UnpairedLoss
from dpo_ext.torch.losses.row import LossRow, find_row, finite, non_negative, plain_row, positive
from dpo_ext.torch.numbers import host_values

UNPAIRED: dict[str, LossRow] = {}
"""Losses of `unpaired_loss`: formulas of ``(x, is desirable, parameters) -> L, dL/dx``."""


@plain_row(
    UNPAIRED,
    "lam_d*s(-beta*(x - z)) desirable, lam_u*s(beta*(x - z)) not",
    "2402.01306, eq. 7",
    needs="reference",
    beta=positive(0.1),
    z=finite(),
    lam_d=non_negative(1.0),
    lam_u=non_negative(1.0),
)
def kto(x, good, beta, z, lam_d, lam_u):
    a = beta * (x - z)
    slope = beta * ds(a)
    return torch.where(good, lam_d * s(-a), lam_u * s(a)), torch.where(
        good, -lam_d * slope, lam_u * slope
    )


@plain_row(
    UNPAIRED,
    "sp(-(beta*x - delta)) desirable, sp(beta*x - delta) not",
    "2404.04656",
    needs="reference",
    beta=positive(0.1),
    delta=finite(),
)
def bco(x, good, beta, delta):
    a = beta * x - delta
    return torch.where(good, sp(-a), sp(a)), torch.where(good, -beta * s(-a), beta * s(a))


@plain_row(
    UNPAIRED,
    "s(-beta*x) desirable, s(beta*x) not",
    "2408.06266",
    needs="reference",
    beta=positive(0.1),
)
def apo_zero_unpaired(x, good, beta):
    a = beta * x
    slope = beta * ds(a)
    return torch.where(good, s(-a), s(a)), torch.where(good, -slope, slope)


def unpaired_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    *,
    loss: str = "kto",
    beta: Any = None,
    weight: Any = None,
    num_examples: float | Tensor | None = None,
    **params: Any,
) -> UnpairedLoss:
    """Loss of single completions, each labelled desirable or not.

    Same as, for ``loss="kto"``::

        a = beta * (logps - ref_logps - z)
        loss = where(labels, lam_d * sigmoid(-a), lam_u * sigmoid(a)).mean()

    Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7; ``"bco"`` arXiv:2404.04656;
    ``"apo_zero_unpaired"`` arXiv:2408.06266. The shared numbers ``z`` (KTO: the mean log-ratio of
    mismatched pairs, see `kto_z`) and ``delta`` (BCO: the running mean of the rewards) are the
    caller's and carry no gradient.

    Args:
        logps: (N,) float32 or float64, summed over the completion's tokens.
        ref_logps: (N,), same dtype; no gradient.
        labels: (N,) bool, or 0 and 1; 1 is desirable.
        loss: ``"kto"``, ``"bco"`` or ``"apo_zero_unpaired"``.
        beta: > 0, a float or (N,).
        weight: >= 0, (N,).
        num_examples: replaces N in the mean: the examples of the whole step.
        **params: ``z``, ``lam_d``, ``lam_u`` of KTO, ``delta`` of BCO.

    Returns:
        UnpairedLoss: a GroupLoss, whose ``metrics`` have TRL's keys.

    Raises:
        TensorError: wrong shapes, dtypes or devices.
        ValueError: unknown loss, missing or unknown parameter.

    >>> from torch import tensor
    >>> out = unpaired_loss(tensor([-9.0, -5.0]), tensor([-9.0, -5.0]), tensor([1, 0]), z=0.0)
    >>> out.loss
    tensor(0.5000)
    """
    row = find_row(UNPAIRED, loss)
    check_pair_of("logps", logps, ref_logps, 1)
    if labels.shape != logps.shape or labels.is_complex() or labels.device != logps.device:
        raise TensorError(
            f"`labels` must be of shape {tuple(logps.shape)} on {logps.device}, found "
            f"{describe(labels)}"
        )
    if host_values(labels) and not bool(((labels == 0) | (labels == 1)).all()):
        raise TensorError("`labels` must be 0 or 1")
    given = params if beta is None else {"beta": beta, **params}
    bound = bind_parameters(row, given, logps)
    divisor: float | Tensor = max(len(logps), 1)
    if num_examples is not None:
        divisor = check_count("num_examples", num_examples)
    factor = None if weight is None else check_weight(weight, logps)
    with torch.no_grad():
        x = logps - ref_logps
        value, slope = row.formula(x, labels != 0, **bound)
        rewards = x * bound["beta"]
    per_example = attach(logps, value, slope)
    total = weighted_sum(per_example, factor) / divisor
    check_is_number(total, value, logps)
    # copies: the caller may fill its buffers again before the metrics are read
    seen, labels = logps.detach().clone(), (labels != 0).clone()
    return UnpairedLoss(total, per_example, rewards, seen, labels, bound.get("z"))


def kto_z(mismatched_logps: Tensor, mismatched_ref_logps: Tensor, *, group: Any = None) -> Tensor:
    """KTO's ``z``: the mean log-ratio of completions under prompts that are not theirs, at least 0.

    An estimate of KL(policy, reference), detached.

    Args:
        mismatched_logps: (N,) float32 or float64, summed over the completion's tokens.
        mismatched_ref_logps: (N,), same dtype; no gradient.
        group: process group whose ranks hold parts of the batch; the mean is over all of theirs.
            ``"local"``: of this rank alone.

    Returns:
        Tensor: a scalar for ``unpaired_loss(..., z=z)`` or ``loss="kto_pair_z"``.

    Raises:
        TensorError: wrong shapes, dtypes or devices.
        ValueError: there are several ranks and no ``group``.

    >>> kto_z(torch.tensor([-3.0, -4.0]), torch.tensor([-5.0, -5.0]))
    tensor(1.5000)
    """
    check_pair_of("mismatched_logps", mismatched_logps, mismatched_ref_logps, 1)
    check_parts("`kto_z`", "is a mean over the batch", group)
    ratios = mismatched_logps.detach() - mismatched_ref_logps
    return mean_over(ratios, check_group(group)).clamp(min=0).to(ratios.dtype)


class RunningMean:
    """BCO's ``delta``: the mean over steps of the mean reward, this step included.

    Args:
        group: process group whose ranks hold parts of each step's rewards; ``"local"``: this rank's
            rewards alone.

    Attributes:
        steps, mean: what is kept; save and set them to go on after a restart.

    Raises:
        ValueError: at `update`, there are several ranks and no ``group``.

    >>> delta = RunningMean()
    >>> delta.update(torch.tensor([1.0, 3.0])), delta.update(torch.tensor([4.0]))
    (2.0, 3.0)
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.steps = 0
        self.mean = 0.0

    def update(self, rewards: Tensor) -> float:
        """Add a step's rewards, of any shape; waits for the device once."""
        check_parts("`RunningMean`", "is a mean over the batch", self.group)
        if self.group is None and not rewards.numel():
            raise TensorError("`rewards` must hold at least one")
        step = mean_over(rewards, check_group(self.group)).item()
        self.steps += 1
        self.mean += (step - self.mean) / self.steps
        return self.mean
