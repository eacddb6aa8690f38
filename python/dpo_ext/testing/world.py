"""A world of preferences whose optimal policy is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from dpo_ext.layout.table import ScoreTable
from dpo_ext.torch.losses.pairs import preference_loss


@dataclass(frozen=True, slots=True)
class BradleyTerryWorld:
    """One empty prompt, four responses of two tokens, labels drawn by Bradley-Terry without noise.

    Response i has the strength ``a_i`` and wins against j in ``a_i / (a_i + a_j)`` of their
    comparisons: for each ordered pair (i, j) the data holds ``a_i`` copies of (winner i, loser j).
        With the reward
    ``log a`` the policy that maximises ``E[reward] - beta KL(pi, pi_ref)``, and that minimises the
    DPO loss on these data, is ``pi_ref * a^(1/beta) / Z``.

    Attributes:
        strengths: ``a``, positive integers.
        reference: ``pi_ref``, fractions that sum to 1.
        responses: the two tokens of each response.
    """

    strengths: tuple[int, ...] = (1, 2, 4, 8)
    reference: tuple[Fraction, ...] = (
        Fraction(8, 16),
        Fraction(4, 16),
        Fraction(2, 16),
        Fraction(2, 16),
    )
    responses: tuple[tuple[int, int], ...] = ((0, 0), (0, 1), (1, 0), (1, 1))

    def preferences(self) -> list[tuple[int, int]]:
        """(winner, loser) of each of the 45 comparisons."""
        count = len(self.strengths)
        return [
            (i, j)
            for i in range(count)
            for j in range(count)
            if i != j
            for _ in range(self.strengths[i])
        ]

    def pairs(self, prompt: tuple[int, ...] = (0,)) -> list[dict[str, np.ndarray]]:
        """The comparisons as rows of token ids, after a prompt that every row shares."""
        ids = [np.array(tokens, dtype=np.int32) for tokens in self.responses]
        start = np.array(prompt, dtype=np.int32)
        return [
            {"prompt_ids": start, "chosen_ids": ids[i], "rejected_ids": ids[j]}
            for i, j in self.preferences()
        ]

    def loss_floor(self) -> float:
        """The lowest DPO loss: the entropy of the labels, the same for every beta."""
        a = self.strengths
        terms = [-math.log(a[i] / (a[i] + a[j])) for i, j in self.preferences()]
        return math.fsum(terms) / len(terms)

    def optimum(self, beta: float | Fraction) -> list[float]:
        """``pi*``; exact fractions, rounded once, where 1/beta is an integer.

        >>> bradley_terry_world().optimum(1)
        [0.2, 0.2, 0.2, 0.4]
        """
        inverse = 1 / Fraction(beta)
        if inverse.denominator == 1:
            exact = [
                r * a ** int(inverse) for r, a in zip(self.reference, self.strengths, strict=True)
            ]
            return [float(w / sum(exact)) for w in exact]
        logs = [
            math.log(r) + math.log(a) / beta
            for r, a in zip(self.reference, self.strengths, strict=True)
        ]
        top = max(logs)
        weights = [math.exp(x - top) for x in logs]
        return [w / math.fsum(weights) for w in weights]

    def reference_logits(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """(3, 2) logits of the reference: of the first token, after a 0, after a 1."""
        r = [float(x) for x in self.reference]
        rows = [[r[0] + r[1], r[2] + r[3]], [r[0], r[1]], [r[2], r[3]]]
        return torch.tensor(rows, dtype=dtype).log()

    def policy(self, logits: Tensor) -> Tensor:
        """(4,) probabilities of the responses under (3, 2) logits, float64."""
        logp = torch.log_softmax(logits.detach().double(), -1)
        return torch.stack([logp[0, i] + logp[1 + i, j] for i, j in self.responses]).exp()

    def logits_and_table(self, logits: Tensor) -> tuple[Tensor, ScoreTable]:
        """The rows that score all comparisons, (180, 2), and their table: for any log-prob
        function.
        """
        rows, targets = [], []
        for pair in self.preferences():
            for response in pair:
                first, second = self.responses[response]
                rows += [0, 1 + first]
                targets += [first, second]
        table = ScoreTable(
            logit_rows=np.arange(len(rows), dtype=np.int64),
            targets=np.array(targets, dtype=np.int32),
            seq_offsets=np.arange(0, len(rows) + 1, 2, dtype=np.int32),
        )
        return logits[torch.tensor(rows)], table

    def train(
        self,
        loss: str | Callable[..., Tensor] = "dpo",
        *,
        beta: float = 0.5,
        logps: Callable[[Tensor, ScoreTable], Tensor] | None = None,
        dtype: torch.dtype = torch.float64,
        steps: int = 100,
        optimizer: str = "lbfgs",
    ) -> list[float]:
        """Train the 3 x 2 logits from the reference on all comparisons; probabilities of the
        responses.

        Args:
            loss: a name of the table, called with ``beta``, or a callable ``(logps, ref_logps) ->
                scalar or (45,)``.
            beta: of a named loss, and of gradient descent's step.
            logps: the log-prob function, by default a log-softmax and a sum.
            dtype: of the logits.
            steps: of the optimizer.
            optimizer: ``"lbfgs"`` for any loss, or ``"descent"``, full-batch steps of ``2/beta^2``,
                which suits losses of ``beta*D`` shaped like DPO's.
        """
        score = _plain_logps if logps is None else logps
        theta = self.reference_logits(dtype).requires_grad_()
        ref = score(*self.logits_and_table(self.reference_logits(dtype))).detach().reshape(-1, 2)

        def objective() -> Tensor:
            values = score(*self.logits_and_table(theta)).reshape(-1, 2)
            if isinstance(loss, str):
                return preference_loss(values, ref, loss=loss, beta=beta).loss
            return loss(values, ref).mean()

        if optimizer == "lbfgs":
            lbfgs = torch.optim.LBFGS(
                [theta], max_iter=steps, tolerance_grad=1e-11, tolerance_change=1e-15,
                line_search_fn="strong_wolfe",
            )  # fmt: skip

            def closure() -> Tensor:
                lbfgs.zero_grad()
                value = objective()
                value.backward()
                return value

            lbfgs.step(closure)
        elif optimizer == "descent":
            for _ in range(steps):
                (gradient,) = torch.autograd.grad(objective(), theta)
                with torch.no_grad():
                    theta -= 2 / beta**2 * gradient
        else:
            raise ValueError(f"`optimizer` must be 'lbfgs' or 'descent', found {optimizer!r}")
        return self.policy(theta).tolist()

    def check(
        self,
        loss: str | Callable[..., Tensor] = "dpo",
        *,
        beta: float = 0.5,
        tolerance: float = 1e-6,
        logps: Callable[[Tensor, ScoreTable], Tensor] | None = None,
    ) -> None:
        """Train a loss and compare with the known optimum.

        Raises:
            AssertionError: the trained policy is not ``pi_ref * a^(1/beta) / Z`` within the
                tolerance.

        >>> bradley_terry_world().check("dpo", beta=0.5)
        >>> bradley_terry_world().check("ipo_sum")  # another optimum  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: the trained policy must be [0.0435, 0.0870, 0.1739, 0.6957], found [...
        """
        want = self.optimum(beta)
        got = self.train(loss, beta=beta, logps=logps)
        worst = max(abs(g - w) for g, w in zip(got, want, strict=True))
        if not worst <= tolerance:
            shown = [", ".join(f"{p:.4f}" for p in policy) for policy in (want, got)]
            raise AssertionError(
                f"the trained policy must be [{shown[0]}], found [{shown[1]}]: off by {worst:.2e}, "
                f"beta {beta}"
            )


def bradley_terry_world() -> BradleyTerryWorld:
    """A world with a known optimum: strengths [1, 2, 4, 8], reference [8, 4, 2, 2]/16.

    >>> world = bradley_terry_world()
    >>> len(world.preferences()), round(world.loss_floor(), 6)
    (45, 0.533607)
    >>> [round(p, 4) for p in world.train("dpo", beta=1.0)]
    [0.2, 0.2, 0.2, 0.4]
    """
    return BradleyTerryWorld()


def _plain_logps(logits: Tensor, table: ScoreTable) -> Tensor:
    logp = torch.log_softmax(logits, -1).gather(1, table.targets.long()[:, None])
    return logp.reshape(-1, 2).sum(1)
