"""The cases of benches/head with logits given: our operators in GB/s, peers beside them.

Bytes are those that the job needs: forward reads the scored rows; the gradient reads them and
writes every row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from cases import SPREAD, WrongError
from elements import first_wrong
from rulers import Job
from torch import Tensor

from dpo_ext.torch.logps import ops

assert ops.DTYPES  # importing registers the operators
OPS = torch.ops.dpo_ext
PLAIN = (1.0, 0.0, 1.0)


class GivenPeer(NamedTuple):
    """A peer that scores given logits; ``overwrites`` says that it leaves its gradient there."""

    name: str
    run: Callable[[Tensor], Tensor]
    """(R, V) logits to (R,) log-probs; rows that are not scored give 0."""
    overwrites: bool = False
    needs: float = 4.0
    """Buffers of the size of the logits that it takes."""
    note: str = "per token"


class GivenCase:
    """(R, V) logits, of which a share of the rows is scored."""

    def __init__(
        self, name: str, rows: int, vocabulary: int, share: float, dtype: torch.dtype, device: str
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        short = str(dtype).removeprefix("torch.")
        self.label = f"{name}, {rows:,} x {vocabulary:,} {short}, {share:.0%} of rows scored"
        self.values = torch.empty(rows, vocabulary, dtype=dtype, device=device)
        for piece in self.values.split(1024):  # float32 noise of one piece at a time
            noise = torch.randn(piece.shape, generator=generator, device=device)
            piece.copy_(noise * SPREAD)
        self.scratch = self.values.clone()
        self.rows = torch.arange(rows, device=device)
        self.labels = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
        scored = torch.rand(rows, generator=generator, device=device) < share
        scored[0] = True
        self.labels[~scored] = -100
        self.targets, self.mask = self.labels.int(), scored
        self.grad = torch.randn(rows, generator=generator, device=device)
        self.scores = self.forward()
        row = vocabulary * dtype.itemsize
        self.read, self.all = int(scored.sum()) * row, rows * row

    def forward(self, stats: bool = False) -> tuple[Tensor, ...]:
        return OPS.token_stats(self.values, self.rows, self.targets, *PLAIN, stats)

    def backward(self, in_place: bool = False) -> Tensor | None:
        # In place: over its own last result. The same bytes, and finite values take the same time.
        saved = (self.rows, self.targets, *self.scores[1:3], self.grad)
        if in_place:
            return OPS.logits_grad_(self.scratch, *saved, *PLAIN)
        return OPS.logits_grad(self.values, *saved, *PLAIN)

    def ours(self) -> dict[str, tuple[Job, int]]:
        """Each operator and the bytes that it needs."""
        return {
            name: (Job(name, call), count)
            for name, call, count in (
                ("forward", self.forward, self.read),
                ("forward + stats", lambda: self.forward(stats=True), self.read),
                ("gradient", self.backward, self.read + self.all),
                ("gradient in place", lambda: self.backward(in_place=True), self.read + self.all),
            )
        }

    def verify_ours(self) -> None:
        expected = self.backward()
        self._compare("ours", self.scores[0], expected, 4e-6)
        self.backward(in_place=True)
        if not torch.equal(self.scratch, expected):
            where = first_wrong(self.scratch, expected, 0.0)
            raise WrongError(f"in place the gradient has other bits: {where}")

    def job(self, peer: GivenPeer) -> Job:
        def forward() -> tuple[Tensor, Tensor]:
            leaf = (self.scratch if peer.overwrites else self.values).detach().requires_grad_()
            return leaf, peer.run(leaf)

        def backward(made: tuple[Tensor, Tensor]) -> Tensor:
            return torch.autograd.grad(made[1], made[0], self.grad.to(made[1].dtype))[0]

        return Job(peer.name, forward, backward)

    def verify(self, peer: GivenPeer) -> None:
        if peer.overwrites:
            self.scratch.copy_(self.values)
        job = self.job(peer)
        made = job.forward()
        logps = made[1].detach().clone()
        eps = torch.finfo(self.values.dtype).eps
        self._compare(peer.name, logps, job.backward(made), max(32 * eps, 1e-4))

    def _compare(self, name: str, logps: Tensor, dz: Tensor, allowed: float) -> None:
        """First, middle, last and one unscored row against float64."""
        rows = len(self.rows)
        unscored = torch.nonzero(~self.mask)[:1, 0].tolist()
        for r in {0, rows // 2, rows - 1, *unscored}:
            if not self.mask[r]:
                if logps[r] != 0 or dz[r].any():
                    raise WrongError(f"{name}: row {r} is not scored and has a value or a gradient")
                continue
            leaf = self.values[r].double().requires_grad_()
            logp = leaf.log_softmax(-1)[self.labels[r]]
            logp.backward(self.grad[r].double())
            off = abs(logps[r].item() - logp.item())
            if not off <= allowed:
                found = f"found {logps[r].item()}, expected {logp.item()}"
                raise WrongError(
                    f"{name}: row {r} is off by {off:.2e}, allowed {allowed:.2e}: {found}"
                )
            error = ((dz[r].double() - leaf.grad).norm() / leaf.grad.norm()).item()
            most = max(4 * torch.finfo(self.values.dtype).eps, 1e-5)
            if not error <= most:
                where = first_wrong(dz[r], leaf.grad, most * leaf.grad.abs().max().item())
                raise WrongError(f"{name}: the gradient of row {r} is off by {error:.2e}: {where}")
