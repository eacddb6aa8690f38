"""`Inputs`: what a loss of pairs is given, checked once at the door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from dpo_ext.errors import TensorError
from dpo_ext.torch.losses.checks import (
    SIDES,
    check_count,
    check_lengths,
    check_log_probs,
    check_reference,
    check_weight,
)
from dpo_ext.torch.losses.ranks import LOCAL, Gathered, check_group, count_pairs, gather_pairs


class Inputs:
    """Log-probs of N pairs and what their mean is over, each checked and converted.

    Attributes:
        logps, ref_logps, lengths: (N, 2); the last two may be None.
        weight: (N,) in the dtype of the log-probs, or None.
        count: what the sum over this rank's pairs is divided by.
        ranks: whose pairs are one batch: None if nothing was said, ``"local"`` for this rank's,
            else a process group of several ranks.
        counted: the count was given, as ``num_pairs``.

    Raises:
        TensorError, TypeError, ValueError: as `preference_loss`, whose arguments they are.
    """

    __slots__ = ("count", "counted", "lengths", "logps", "ranks", "ref_logps", "weight")

    def __init__(
        self,
        logps: Tensor,
        ref_logps: Tensor | None,
        lengths: Tensor | None,
        weight: Any = None,
        num_pairs: float | Tensor | None = None,
        group: Any = None,
    ) -> None:
        check_log_probs(logps)
        if ref_logps is not None:
            check_reference(ref_logps, logps)
        if lengths is not None:
            check_lengths(lengths, logps)
        self.logps, self.ref_logps, self.lengths = logps, ref_logps, lengths
        self.weight = None if weight is None else check_weight(weight, logps)
        self.ranks = None if group is None else check_group(group) or LOCAL
        self.counted = num_pairs is not None
        self.count: float | Tensor
        if num_pairs is not None:
            self.count = check_count("num_pairs", num_pairs)
        elif self.group is not None:
            self.count = count_pairs(logps.shape[0], logps, self.group)
        else:
            self.count = float(max(logps.shape[0], 1))

    @property
    def group(self) -> Any:
        """The process group to gather over, or None for this rank's pairs alone."""
        return None if self.ranks == LOCAL else self.ranks

    def gathered(self) -> Gathered:
        """The pairs of all ranks of the group."""
        return gather_pairs(self.logps, self.ref_logps, self.lengths, self.group)

    def read(self) -> tuple[Tensor, Tensor | None]:
        """``logps, ref_logps`` for a function that autograd differentiates: pairs of weight 0 get
        no gradient, and where one holds NaN or an infinity, numbers that no function stumbles on.

        Selected, not multiplied: 0 * NaN is NaN, in a gradient too.
        """
        if self.weight is None:
            return self.logps, self.ref_logps
        skip, logps, ref_logps = (self.weight == 0)[:, None], self.logps, self.ref_logps
        numbers = logps.detach().isfinite()
        if ref_logps is not None:
            numbers = numbers & ref_logps.isfinite()
        stand_in = skip & ~numbers.all(1, keepdim=True)
        shown = torch.where(stand_in, torch.full_like(logps, -1.0), logps.detach())
        if ref_logps is not None:
            ref_logps = torch.where(stand_in, torch.full_like(ref_logps, -1.0), ref_logps)
        return torch.where(skip, shown, logps), ref_logps

    def averaged(self) -> Inputs:
        """Of log-probs a token: each sum divided by its length, the lengths 1."""
        assert self.lengths is not None  # asked for by name before
        divisor = self.lengths.to(self.logps.dtype).clamp(min=1)  # a mean over 0 tokens is 0
        ref_logps = None if self.ref_logps is None else self.ref_logps / divisor
        num_pairs = self.count if self.counted else None
        ones = torch.ones_like(self.lengths)
        return Inputs(self.logps / divisor, ref_logps, ones, self.weight, num_pairs, self.ranks)

    def explain_nan(self, name: str, params: Mapping[str, Any], per_pair: Tensor) -> NoReturn:
        """Raise the error of a loss that is NaN: which tensor of which pair is to blame."""
        for tensor_name, tensor in (("logps", self.logps), ("ref_logps", self.ref_logps)):
            if tensor is not None and tensor.isnan().any():
                pair, side = tensor.isnan().nonzero()[0].tolist()
                raise TensorError(
                    f"pair {pair}: `{tensor_name}` must not be NaN, found NaN for {SIDES[side]}"
                )
        bad = per_pair.isnan().nonzero()
        if not len(bad):
            raise TensorError(
                f"loss {name!r} of the batch is NaN, though that of no pair here is: some are +inf "
                "and some -inf, or a pair of another rank is NaN"
            )
        pair = int(bad[0])
        if name == "orpo" and self.lengths is not None and bool((self.lengths[pair] < 1).any()):
            side = int(self.lengths[pair].argmin())
            raise TensorError(
                f"pair {pair}: loss 'orpo' needs a scored token of each completion, found none for "
                f"{SIDES[side]}: the odds of an empty completion are infinite\n"
                "hint: drop the pair, or give it weight 0"
            )
        found = f"logps {self.logps[pair].tolist()}"
        if self.ref_logps is not None:
            found += f", ref_logps {self.ref_logps[pair].tolist()}"
        raise TensorError(
            f"pair {pair}: loss {name!r} is NaN for {found}, parameters {dict(params)}"
        )
