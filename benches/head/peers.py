"""The peers of benches/head. A peer that is not installed is named with the reason, not hidden.

Nothing here is theirs: each is imported and called as its own host calls it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import Candidate, HeadCase
from given import GivenCase, GivenPeer
from torch import Tensor

LIGER_BETA = 0.01  # without a reference the margins are large: a larger beta saturates the sigmoid


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def attempt(makers: Any, left_out: Callable[[str, str], None]) -> Iterator[Any]:
    """What each maker gives; one that cannot be had is reported with its reason."""
    for name, make in makers:
        try:
            yield from make()
        except Exception as error:  # a peer may fail in any way, and must not end the run
            left_out(name, reason(error))


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def scored_logps(logits: Tensor, labels: Tensor, softcap: float | None, wide: bool) -> Tensor:
    """What trainers write: (R,) log-probs of all rows, 0 where a row is not scored."""
    z = logits.float() if wide else logits
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    logps = z.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0].float()
    return torch.where(labels >= 0, logps, 0.0)


def compiled(device: torch.device) -> Callable:
    """`scored_logps` by torch.compile; where no GPU is, without its code generator."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return torch.compile(scored_logps, dynamic=False, backend=backend)


# ---- given logits -----------------------------------------------------


def given_peers(case: GivenCase, left_out: Callable[[str, str], None]) -> Iterator[GivenPeer]:
    labels, mask = case.labels, case.mask
    safe = labels.clamp(min=0)

    def by_torch() -> Iterator[GivenPeer]:
        yield GivenPeer("torch, same dtype", lambda z: scored_logps(z, labels, None, False))
        wide = lambda z: scored_logps(z, labels, None, True)  # noqa: E731
        yield GivenPeer("torch, float32 upcast", wide, needs=10)

    def by_compile() -> Iterator[GivenPeer]:
        run = compiled(case.values.device)
        yield GivenPeer("torch.compile, float32", lambda z: run(z, labels, None, True), needs=10)

    def by_trl() -> Iterator[GivenPeer]:
        from trl.trainer.utils import selective_log_softmax

        def select(z: Tensor) -> Tensor:
            return torch.where(mask, selective_log_softmax(z, safe, row_mask=mask), 0.0)

        yield GivenPeer(f"TRL {version('trl')} selective_log_softmax", select)

    def by_trl_kernel() -> Iterator[GivenPeer]:
        if case.values.device.type != "cuda":
            raise RuntimeError("a Triton kernel needs a GPU")
        from trl.kernels import selective_log_softmax_and_entropy

        def run(z: Tensor) -> Tensor:
            return selective_log_softmax_and_entropy(z, safe, 1.0, mask)[0]

        yield GivenPeer(f"TRL {version('trl')} Triton", run, note="per token, with entropy")

    def by_liger() -> Iterator[GivenPeer]:
        if case.values.device.type != "cuda":
            raise RuntimeError("a Triton kernel needs a GPU")
        from liger_kernel.transformers.functional import liger_cross_entropy

        def run(z: Tensor) -> Tensor:
            return -liger_cross_entropy(z, labels, reduction="none")

        name = f"Liger {version('liger-kernel')} cross entropy"
        yield GivenPeer(name, run, overwrites=True, note="per token, gradient made in forward")

    def by_quack() -> Iterator[GivenPeer]:
        from quack.cross_entropy import cross_entropy

        def run(z: Tensor) -> Tensor:
            return -cross_entropy(z, labels, reduction="none", inplace_backward=True)

        name = f"QuACK {version('quack-kernels')} cross entropy"
        yield GivenPeer(name, run, overwrites=True, note="per token, gradient in place")

    makers = (
        ("torch", by_torch),
        ("torch.compile", by_compile),
        ("TRL selective_log_softmax", by_trl),
        ("TRL Triton", by_trl_kernel),
        ("Liger cross entropy", by_liger),
        ("QuACK cross entropy", by_quack),
    )
    yield from attempt(makers, left_out)


# ---- the head inside --------------------------------------------------


def head_peers(case: HeadCase, left_out: Callable[[str, str], None]) -> Iterator[Candidate]:
    """Each peer with a trained weight, and with a frozen one where it saves something by that."""
    model, R, M, size = case.model, case.R, case.M, case.dtype.itemsize
    V, H, labels = model.vocabulary, model.hidden, case.labels
    g = case.per_token(case.upstream)
    logps = torch.zeros(R, dtype=torch.float64, device=case.device)
    logps[case.rows] = case.oracle.logps
    upstream = torch.zeros(R, device=case.device)
    upstream[case.rows] = g.float()
    inputs = V * H * (4 + size) + 8 * R * H

    def tokens(name: str, run: Callable, needs: int, note: str = "") -> Iterator[Candidate]:
        for trained in (True, False):
            yield Candidate(
                name=name if trained else f"{name}, frozen head",
                gives="tokens",
                trained=trained,
                run=run,
                expected=logps,
                upstream=upstream,
                g=g,
                needs=needs + inputs,
                note=note,
            )

    def scalar(
        name: str, run: Callable, g: Tensor, value: Tensor, needs: int, note: str, scale: float
    ) -> Iterator[Candidate]:
        whole = (name, "one scalar", True, run, value, None, g, None, needs + inputs, note, scale)
        yield Candidate(*whole)

    def no_softcap(who: str) -> None:
        if model.softcap:
            raise ValueError(f"{who} has no softcap")

    def by_torch() -> Iterator[Candidate]:
        def same(x: Tensor, w: Tensor) -> Tensor:
            return scored_logps(x @ w.t(), labels, model.softcap, False)

        def wide(x: Tensor, w: Tensor) -> Tensor:
            return scored_logps(x @ w.t(), labels, model.softcap, True)

        capped = 2 if model.softcap else 0
        note = "all rows multiplied"
        yield from tokens("torch, same dtype", same, (4 + capped) * R * V * size, note)
        yield from tokens("torch, float32 upcast", wide, R * V * (2 * size + 12 + 4 * capped), note)

    def by_compile() -> Iterator[Candidate]:
        score = compiled(case.device)

        def run(x: Tensor, w: Tensor) -> Tensor:
            return score(x @ w.t(), labels, model.softcap, True)

        yield from tokens("torch.compile, float32", run, R * V * (2 * size + 8), "all rows")

    def by_trl() -> Iterator[Candidate]:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WIDTH  # what its trainers pass

        mask = case.mask

        def run(x: Tensor, w: Tensor) -> Tensor:
            few, some = x[mask], labels[mask]
            out = ChunkedLogProbFunction.apply(
                few, w, None, some, 1.0, min(WIDTH, V), model.softcap, 1.0, ()
            )[0]
            return out.new_zeros(R).masked_scatter(mask, out)

        tile = min(4096, M) * min(WIDTH, V) * size
        yield from tokens(f"TRL {version('trl')} chunked head", run, tile)

    def by_liger() -> Iterator[Candidate]:
        no_softcap("it")
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as Fused,
        )

        def run(x: Tensor, w: Tensor) -> Tensor:
            return -Fused.apply(x, w, labels).float()

        name = f"Liger {version('liger-kernel')} fused scaled CE"
        yield from tokens(name, run, 512 * V * 16, "dW in the weight's dtype")

    def by_liger_dpo() -> Iterator[Candidate]:
        no_softcap("it")
        from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss

        S, length = case.S, case.length
        # Chosen sequences first, as it wants them; done before the clock starts.
        order = torch.cat([torch.arange(0, S, 2), torch.arange(1, S, 2)]).to(case.device)
        target = labels.view(S, length)[order]
        pairs = max(1, case.head.chunk_rows // (2 * length))
        loss_of = LigerFusedLinearDPOLoss(
            beta=LIGER_BETA,
            use_ref_model=False,
            chunk_size=pairs,
            compiled=case.device.type == "cuda",
        )

        def run(x: Tensor, w: Tensor) -> Tensor:
            return loss_of(w, x.view(S, length, H)[order], target)[0]

        value, g = case.dpo(LIGER_BETA, 0.0)
        needs = 2 * pairs * length * V * (2 * size + 12) + R * H * size * 2 + V * H * size
        note = "scalar only, no reference, all rows multiplied, dW in the weight's dtype"
        name = f"Liger {version('liger-kernel')} fused linear DPO"
        yield from scalar(name, run, g, value, needs, note, LIGER_BETA)

    def by_quack() -> Iterator[Candidate]:
        no_softcap("it")
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        def run(x: Tensor, w: Tensor) -> Tensor:
            return chunked_linear_cross_entropy(x, w, labels, reduction="sum")

        value = -case.oracle.logps.sum()
        name = f"QuACK {version('quack-kernels')} chunked CE"
        note = "scalar only (sum of cross entropies), all rows multiplied"
        ones, tiles = torch.ones_like(g), 2 * 4096 * V * size
        yield from scalar(name, run, -ones, value, tiles, note, case.S**0.5)

    def by_cce() -> Iterator[Candidate]:
        if case.device.type != "cuda":
            raise RuntimeError("a Triton kernel needs a GPU")
        from cut_cross_entropy import linear_cross_entropy

        def run(x: Tensor, w: Tensor, filter_eps: str | None = "high") -> Tensor:
            options = {"softcap": model.softcap, "reduction": "none", "filter_eps": filter_eps}
            return -linear_cross_entropy(x, w, labels, **options)

        name, note = f"CCE {version('cut-cross-entropy')}", "no logits in memory"
        yield from tokens(name, run, 0, f"{note}, small probabilities left out of the gradient")
        exact = lambda x, w: run(x, w, None)  # noqa: E731
        yield from tokens(f"{name}, nothing left out", exact, 0, note)

    def by_flashinfer() -> Iterator[Candidate]:
        no_softcap("it")
        if case.device.type != "cuda" or torch.cuda.get_device_capability(case.device)[0] != 10:
            raise RuntimeError("its kernels are for sm_100 and its kin alone")
        from flashinfer.chunked_lm_head import chunked_lm_head_logprob

        def run(x: Tensor, w: Tensor) -> Tensor:
            return chunked_lm_head_logprob(x, w, labels)

        name = f"FlashInfer {version('flashinfer-python')} chunked head"
        yield from tokens(name, run, 4096 * V * size, "experimental there")

    makers = (
        ("torch", by_torch),
        ("torch.compile", by_compile),
        ("TRL chunked head", by_trl),
        ("Liger fused scaled CE", by_liger),
        ("Liger fused linear DPO", by_liger_dpo),
        ("QuACK chunked CE", by_quack),
        ("CCE", by_cce),
        ("FlashInfer chunked head", by_flashinfer),
    )
    yield from attempt(makers, left_out)
