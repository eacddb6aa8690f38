"""The cases of benches/head: inputs, what float64 says of them, and what is held against it.

Letters: R rows of hidden states or logits, M of them scored, S sequences, N pairs, H hidden, V
vocabulary. In a case of the fused head each sequence ends with 512 scored rows, or with fewer where
a pair would have more than all; what comes before them, as a prompt would, is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from elements import first_wrong
from rulers import Job, Products, steps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ext.torch import ScoreTable, linear_preference_loss, linear_sequence_logps
from dpo_ext.torch.logps.head import Head, HeadOptions, Linear
from dpo_ext.torch.logps.scores import Transform

BETA = 0.1
SPREAD = 3.0  # standard deviation of the logits
PLANS = ("frozen", "recompute", "pairwise")


class Model(NamedTuple):
    name: str
    hidden: int
    vocabulary: int
    softcap: float | None = None


class Layout(NamedTuple):
    """How the rows of a case of the fused head lie."""

    tokens: int
    """Scored rows of a sequence."""
    sequences: int
    length: int
    """Of a sequence, with what is not scored."""

    @staticmethod
    def of(scored: int, share: float, tokens: int) -> Layout:
        tokens = min(tokens, scored // 2)
        return Layout(tokens, scored // tokens, round(tokens / share))

    @property
    def scored(self) -> int:
        return self.sequences * self.tokens

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def offsets(self) -> list[int]:
        return list(range(0, self.scored + 1, self.tokens))


def chunk_rows(model: Model, dtype: torch.dtype, asked: int | None = None) -> int:
    """Rows of a chunk of the head, as it cuts itself."""
    x = torch.empty(1, model.hidden, dtype=dtype)
    weight = torch.empty(1, 1, dtype=dtype).expand(model.vocabulary, model.hidden)
    options = HeadOptions(Transform.of(1.0, model.softcap, 1.0), chunk_rows=asked)
    return Head.of(Linear(x, weight, None), options).chunk_rows


class WrongError(AssertionError):
    """A result is not what float64 says."""


class Candidate(NamedTuple):
    """Ours or a peer's: what it computes, and how that is judged and differentiated."""

    name: str
    gives: str
    """"sequences", "tokens" (R,) or "one scalar"."""
    trained: bool
    """Whether the weight gets a gradient too."""
    run: Callable[[Tensor, Tensor], Tensor]
    expected: Tensor
    """float64, of the shape of what `run` gives."""
    upstream: Tensor | None
    """dL/d(what `run` gives), in its dtype; None for a scalar."""
    g: Tensor
    """(M,) float64 dL/d(log-prob of each scored token)."""
    plan: str | None = None
    needs: int = 0
    """Bytes beyond the inputs, so that what cannot fit is left out before it is tried."""
    note: str = ""
    scale: float = 1.0
    """Of a scalar: how much an error of one sequence's log-prob moves it."""


class HeadCase:
    """Hidden states, a head and pairs of sequences."""

    def __init__(
        self,
        model: Model,
        scored: int,
        share: float,
        dtype: torch.dtype,
        device: torch.device,
        tokens: int = 512,
        chunk_rows: int | None = None,
    ) -> None:
        generator = torch.Generator(device=device).manual_seed(0)

        def noise(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

        self.model, self.share, self.dtype, self.device = model, share, dtype, device
        self.layout = Layout.of(scored, share, tokens)
        self.tokens, self.S, self.length = self.layout
        tokens = self.tokens
        self.M, self.R = self.layout.scored, self.layout.rows
        H, V = model.hidden, model.vocabulary
        self.hidden = noise(self.R, H)
        self.weight = noise(V, H).mul_(SPREAD / math.sqrt(H))
        place = torch.arange(self.R, device=device).view(self.S, self.length)
        self.rows = place[:, -tokens:].reshape(-1)
        targets = torch.randint(0, V, (self.M,), generator=generator, device=device)
        self.labels = torch.full((self.R,), -100, device=device)
        self.labels[self.rows] = targets
        self.mask = self.labels != -100
        self.table = ScoreTable(
            logit_rows=self.rows,
            targets=targets.int(),
            seq_offsets=torch.tensor(self.layout.offsets, dtype=torch.int32, device=device),
        )
        self.upstream = noise(self.S // 2, 2, dtype=torch.float32)
        self.how = Transform.of(1.0, model.softcap, 1.0)
        linear = Linear(self.hidden, self.weight, None)
        self.head = Head.of(linear, HeadOptions(self.how, chunk_rows=chunk_rows))
        self.options = {"softcap": model.softcap, "chunk_rows": chunk_rows}
        noise_of_reference = noise(self.S // 2, 2, dtype=torch.float64) * 4
        self.ref = self.oracle.sequences + noise_of_reference

    @cached_property
    def oracle(self) -> Oracle:
        x = self.hidden[self.rows]
        return Oracle(x, self.weight, self.table.targets.long(), self.model.softcap, self.tokens)

    @property
    def label(self) -> str:
        cap = f", softcap {self.model.softcap:g}" if self.model.softcap else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model.name}{cap}, M {self.M:,}, {self.share:.0%} of rows scored, {dtype}"

    def per_token(self, per_sequence: Tensor) -> Tensor:
        return per_sequence.double().reshape(-1).repeat_interleave(self.tokens)

    def ours(self) -> list[Candidate]:
        """The three plans."""
        H, V, size = self.model.hidden, self.model.vocabulary, self.dtype.itemsize
        scratch = min(self.head.chunk_rows, self.M) * V * size
        kept = 4 * self.R * H * size
        found = []
        for plan in ("frozen", "recompute"):

            def run(x: Tensor, w: Tensor, plan: str = plan) -> Tensor:
                return linear_sequence_logps(x, w, self.table, plan=plan, **self.options)

            trained = plan == "recompute"
            found.append(
                Candidate(
                    name=f"ours, {plan}",
                    gives="sequences",
                    trained=trained,
                    run=run,
                    expected=self.oracle.sequences,
                    upstream=self.upstream,
                    g=self.per_token(self.upstream),
                    plan=plan,
                    needs=scratch + kept + trained * V * H * (4 + size),
                )
            )
        reference = self.ref.float()

        def by_pairs(x: Tensor, w: Tensor) -> Tensor:
            table, options = self.table, {"beta": BETA, "plan": "pairwise", **self.options}
            return linear_preference_loss(x, w, table, reference, **options).loss

        loss, g = self.dpo(BETA, self.ref)
        needs = scratch + kept + V * H * (4 + size)
        pairs = ("ours, pairwise", "one scalar", True, by_pairs, loss, None, g, "pairwise", needs)
        return [*found, Candidate(*pairs, scale=BETA)]

    def dpo(self, beta: float, reference: Tensor | float) -> tuple[Tensor, Tensor]:
        """float64 DPO loss of the case, and dL/d(log-prob of each token)."""
        leaf = self.oracle.sequences.clone().requires_grad_()
        margins = (leaf - reference) @ torch.tensor([1.0, -1.0], dtype=leaf.dtype).to(leaf.device)
        loss = -torch.nn.functional.logsigmoid(beta * margins).mean()
        (c,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), self.per_token(c)

    def products(self) -> Products:
        """The ruler: gathered rows, and one chunk of gradients to multiply."""
        x = self.hidden[self.rows]
        rows = min(self.head.chunk_rows, self.M)
        targets = self.table.targets[:rows]
        z = self.head.logits(x[:rows], self.weight, None, self.head.scratch(self.weight, self.M))
        values, state = self.head.fold(z, targets, False)
        dz = self.head.gradient(z, targets, state, torch.ones_like(values[0]))
        return Products(self.head, x, self.weight, dz)

    def job(self, candidate: Candidate) -> Job:
        def forward() -> tuple[list[Tensor], Tensor]:
            x = self.hidden.detach().requires_grad_()
            w = self.weight.detach().requires_grad_(candidate.trained)
            return ([x, w] if candidate.trained else [x]), candidate.run(x, w)

        def backward(made: tuple[list[Tensor], Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(made[1], made[0], candidate.upstream)

        return Job(candidate.name, forward, backward)

    def verify(self, candidate: Candidate) -> list[str]:
        """Raises `WrongError` where value or gradients are not those of float64.

        Also compares the products that a plan of ours ran with those of its steps, and returns what
        differs: then its bound is not its own.
        """
        job = self.job(candidate)
        # Peers run without it: torch.compile leaves a function as it is while products are counted.
        forward, backward = (Count() if candidate.plan else nullcontext() for _ in range(2))
        with forward:
            made = job.forward()
        with backward:
            grads = job.backward(made)
        got, eps = made[1].detach(), max(torch.finfo(self.dtype).eps, 1e-5)
        of_sequence = 5 * math.sqrt(self.tokens) * eps * candidate.scale
        allowed = 32 * eps if candidate.gives == "tokens" else of_sequence
        off = (got.double() - candidate.expected).abs()
        _close(f"{candidate.name}: values", off.max(), allowed, got, candidate.expected)
        allowed = max(10 * torch.finfo(self.dtype).eps, 1e-3)
        some = torch.unique(torch.linspace(0, self.M - 1, 5, device=self.device).long())
        want = self.oracle.dx(some, candidate.g)
        dx = grads[0]
        self._close_rows(f"{candidate.name}: dX", dx, self.rows[some], want, allowed)
        if self.M < self.R and dx[~self.mask].any():
            where = first_wrong(dx * ~self.mask[:, None], torch.zeros_like(dx), 0.0)
            raise WrongError(f"{candidate.name}: rows that are not scored have a gradient: {where}")
        if candidate.trained:
            ids = self.oracle.some_ids()
            want = self.oracle.dw(ids, candidate.g)
            self._close_rows(f"{candidate.name}: dW", grads[1], ids, want, allowed)
        if candidate.plan is None:
            return []
        planned = self.steps(candidate.plan)
        counted = zip(("forward", "backward"), planned, (forward, backward), strict=True)
        return [
            f"{candidate.name}: {where} multiplied {count.rows} rows, its steps say {rows}"
            for where, part, count in counted
            if count.rows != (rows := sorted(s.rows.stop - s.rows.start for s in _products(part)))
        ]

    @staticmethod
    def _close_rows(what: str, got: Tensor, ids: Tensor, want: Tensor, allowed: float) -> None:
        """Some rows of a gradient by their norm."""
        found = got[ids].double()
        error = (found - want).norm() / want.norm()
        per_element = allowed * want.abs().max().item()
        _close(f"{what}, of rows {ids.tolist()},", error, allowed, found, want, per_element)

    def steps(self, plan: str) -> Any:
        return steps(plan, self.M, self.head.chunk_rows, self.layout.offsets)


def _products(part: list) -> list:
    return [step for step in part if step.kind in ("logits", "dx", "dw")]


def _close(
    what: str,
    error: Tensor,
    allowed: float,
    got: Tensor,
    want: Tensor,
    per_element: float | None = None,
) -> None:
    if not error.item() <= allowed:  # NaN is not within anything
        where = first_wrong(got, want, allowed if per_element is None else per_element)
        raise WrongError(f"{what} are off by {error.item():.2e}, allowed {allowed:.2e}: {where}")


class Count(TorchDispatchMode):
    """Rows of each product that runs inside: of ``x W^T`` and ``dz W`` the height, of ``dz^T x``
    the inner size."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[int] = []

    @property
    def rows(self) -> list[int]:
        return sorted(self._rows)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a = args[1] if packet is torch.ops.aten.addmm else args[0]
            transposed = a.stride(0) == 1 and a.shape[1] > 1 and a.stride(1) > 1
            self._rows.append(a.shape[1] if transposed else a.shape[0])
        return func(*args, **(kwargs or {}))


class Oracle:
    """float64: each token's log-prob, and its gradients for a given dL/dlogp.

    x (M, H) gathered rows, w (V, H), targets (M,). Logits are computed a block at a time.
    """

    BLOCK = 2048, 16_384  # rows, columns

    def __init__(
        self, x: Tensor, w: Tensor, targets: Tensor, softcap: float | None, tokens: int
    ) -> None:
        self.x, self.w, self.targets, self.softcap = x, w, targets, softcap
        self.lse = x.new_full((len(x),), -math.inf, dtype=torch.float64)
        for rows, columns in self._blocks(len(x)):
            y = self._y(x[rows], w[columns])
            self.lse[rows] = torch.logaddexp(self.lse[rows], y.logsumexp(1))
        z = torch.cat([(a.double() * w[t].double()).sum(1) for a, t in self._gathered()])
        y = softcap * torch.tanh(z / softcap) if softcap else z
        self.logps = y - self.lse
        self.sequences = self.logps.view(-1, tokens).sum(1).view(-1, 2)

    def _gathered(self) -> Any:
        return zip(self.x.split(self.BLOCK[0]), self.targets.split(self.BLOCK[0]), strict=True)

    def _blocks(self, rows: int) -> Any:
        for row in range(0, rows, self.BLOCK[0]):
            for column in range(0, len(self.w), self.BLOCK[1]):
                yield slice(row, row + self.BLOCK[0]), slice(column, column + self.BLOCK[1])

    def _y(self, x: Tensor, w: Tensor) -> Tensor:
        z = x.double() @ w.double().t()
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def _dz(self, y: Tensor, lse: Tensor, hit: Tensor, g: Tensor) -> Tensor:
        dy = g[:, None] * (hit.double() - (y - lse[:, None]).exp())
        return dy * (1 - (y / self.softcap).square()) if self.softcap else dy

    def dx(self, some: Tensor, g: Tensor) -> Tensor:
        """Gradient of the hidden states of some tokens."""
        x, lse, targets = self.x[some], self.lse[some], self.targets[some]
        total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for _, columns in self._blocks(1):
            w = self.w[columns]
            ids = torch.arange(columns.start, columns.start + len(w), device=x.device)
            dz = self._dz(self._y(x, w), lse, targets[:, None] == ids, g[some])
            total += dz @ w.double()
        return total

    def some_ids(self) -> Tensor:
        """Rows of the weight whose gradient is compared: targets, first and last."""
        ends = torch.tensor([0, len(self.w) - 1], device=self.w.device)
        return torch.unique(torch.cat([self.targets[:: max(1, len(self.targets) // 6)], ends]))

    def dw(self, ids: Tensor, g: Tensor) -> Tensor:
        """Gradient of some rows of the weight."""
        dz = self._dz(self._y(self.x, self.w[ids]), self.lse, self.targets[:, None] == ids, g)
        return dz.t() @ self.x.double()
