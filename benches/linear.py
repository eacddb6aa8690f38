"""What does the fused head cost on the CPU, beside what else computes the same loss?

Peers: `log_softmax(hidden @ W.T)`, `F.cross_entropy` of the same product, and torch's own
`F.linear_cross_entropy` where it has one. Verifies values and gradients against float64 on a small
vocabulary first. Then forward + backward of each plan and of each peer, taking turns in one
process, in its own time, and before that each once in a process of its own, for its peak memory
beyond the inputs. Beside them the products alone: three of 2MHV for a trained head, two for a
frozen one.
`--chunk-rows` cuts the plans into chunks, `--record` appends the rows to benches/RESULTS.md.

With `--gate` many cases run, each in a process of its own: every dtype, one chunk and several (of
rows no fewer than the hidden size, below which a product of few rows costs more than it saves),
with the instructions that this CPU has and with those of smaller ones. The exit code is 1 if a plan
takes longer than a peer that runs eagerly, or more memory.

    python benches/linear.py [--record] [--rows 256] [--hidden 896] [--vocabulary 151936]
                             [--dtype float32] [--chunk-rows 256]
    python benches/linear.py --gate
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from logps import commit, device
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from dpo_ext.torch import ScoreTable, linear_preference_loss, linear_sequence_logps, preference_loss

REPEATS, WARM_UP = 5, 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ISAS = {
    "native": {},
    "AVX-512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
GATE = (
    {"rows": 128, "hidden": 896, "chunk_rows": None},
    {"rows": 768, "hidden": 256, "chunk_rows": 256},
)
SLOW = 4_096  # the vocabulary where torch needs seconds for what takes it milliseconds in float32
TILE_MB = 16
"""What a plan may take beyond a peer: widened tiles of weight and products, whatever V is."""


def preference(tokens: Tensor, table: ScoreTable, ref: Tensor) -> Tensor:
    return preference_loss(tokens.view(table.n_sequences, -1).sum(1).view(-1, 2), ref).loss


def by_log_softmax(x: Tensor, w: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    """What a user writes."""
    logits = x @ w.T
    logps = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return preference(logps.gather(1, table.targets.long()[:, None])[:, 0], table, ref)


def by_cross_entropy(x: Tensor, w: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    logits = x @ w.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, table.targets.long(), reduction="none")
    return preference(-losses, table, ref)


def by_torchs_own(x: Tensor, w: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    losses = F.linear_cross_entropy(x, w, table.targets.long(), reduction="none")
    return preference(-losses.to(ref.dtype), table, ref)


def by_scores(x: Tensor, w: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    return preference_loss(linear_sequence_logps(x, w, table, **how), ref).loss


def by_pairs(x: Tensor, w: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    return linear_preference_loss(x, w, table, ref, **how).loss


PEERS: dict[str, Callable] = {"torch": by_log_softmax, "F.cross_entropy": by_cross_entropy}
if hasattr(F, "linear_cross_entropy"):
    PEERS["F.linear_cross_entropy"] = by_torchs_own
PLANS: dict[str, tuple[Callable, dict]] = {
    "recompute": (by_scores, {"plan": "recompute"}),
    "pairwise": (by_pairs, {"plan": "pairwise"}),
    "frozen": (by_scores, {"plan": "frozen"}),
    "frozen, exact target": (by_scores, {"plan": "frozen", "exact_target": True}),
}
FROZEN_HEAD = ", frozen head"
TRAINED = ("recompute", "pairwise", *PEERS)
FROZEN = ("frozen", "frozen, exact target", *(name + FROZEN_HEAD for name in PEERS))
WAYS = {
    **PLANS,
    **{name: (way, {}) for name, way in PEERS.items()},
    **{name + FROZEN_HEAD: (way, {}) for name, way in PEERS.items()},
}


def inputs(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of hidden states, a head, a table of sequences of 16 tokens, a reference."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, generator=generator, dtype=torch.float32).to(dtype)
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float32).to(dtype)
    table = ScoreTable(
        logit_rows=torch.arange(rows),
        targets=torch.randint(0, vocabulary, (rows,), generator=generator, dtype=torch.int32),
        seq_offsets=torch.arange(0, rows + 1, 16, dtype=torch.int32),
    )
    ref = torch.randn(rows // 32, 2, generator=generator)
    return x, w / hidden**0.5, table, ref


def step(
    name: str, x: Tensor, w: Tensor, table: ScoreTable, ref: Tensor, chunk_rows: int | None = None
) -> tuple[float, list]:
    """Seconds of one forward and backward pass, and the gradients."""
    hidden, weight = x.detach().requires_grad_(), w.detach().requires_grad_(name in TRAINED)
    way, how = WAYS[name]
    start = time.process_time()
    way(hidden, weight, table, ref, {**how, "chunk_rows": chunk_rows}).backward()
    return time.process_time() - start, [hidden.grad, weight.grad]


def products(x: Tensor, w: Tensor) -> tuple[float, float]:
    """Seconds of the three products of a trained head and the two of a frozen one, at their best:
    in the dtype of the operands, or widened once, whichever is less.
    """
    found = []
    for dtype in {x.dtype, torch.float32}:
        a, b = x.to(dtype), w.to(dtype)
        z = a @ b.T
        turns = []
        for _ in range(3):
            took = [time.process_time()]
            for out, left, right in ((z, a, b.T), (None, z, b), (None, z.T, a)):
                torch.mm(left, right, out=out)
                took.append(time.process_time())
            turns.append([later - took[0] for later in took[2:]])
        found.append([statistics.median(column) for column in zip(*turns, strict=True)])
    frozen, trained = (min(column) for column in zip(*found, strict=True))
    return trained, frozen


def verify() -> None:
    x, w, table, ref = inputs(64, 32, 501, torch.float32)
    _, exact = step("torch", x.double(), w.double(), table, ref.double())
    for name in WAYS:
        _, grads = step(name, x, w, table, ref, 48)
        for got, want in zip(grads, exact, strict=True):
            if got is not None:
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def options(arguments: argparse.Namespace) -> list[str]:
    """The command line that gives these sizes again."""
    names = ("rows", "hidden", "vocabulary", "dtype", "chunk_rows")
    given = {f"--{n.replace('_', '-')}": getattr(arguments, n) for n in names}
    return [part for name, value in given.items() if value for part in (name, str(value))]


def peak_megabytes(name: str, given: tuple[Tensor, ...], chunk_rows: int | None) -> float:
    """Peak memory of one pass beyond its inputs, in a process of its own."""
    read, write = os.pipe()
    if not os.fork():
        step(name, *inputs(64, 32, 501, given[0].dtype))  # its pages of code are no memory of it
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
        before = _kilobytes("VmRSS")
        step(name, *given, chunk_rows)
        os.write(write, str(_kilobytes("VmHWM") - before).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        kilobytes = answer.read()
    os.wait()
    return float(kilobytes) / 1e3


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def measure(arguments: argparse.Namespace) -> dict:
    """Seconds of each turn of each way, megabytes of each, and the seconds of the products."""
    dtype = DTYPES[arguments.dtype]
    given = inputs(arguments.rows, arguments.hidden, arguments.vocabulary, dtype)
    peaks = {name: peak_megabytes(name, given, arguments.chunk_rows) for name in WAYS}
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(REPEATS + WARM_UP):
        for name in WAYS:
            seconds, _ = step(name, *given, arguments.chunk_rows)
            if repeat >= WARM_UP:
                took[name].append(seconds)
    return {
        "s": took,
        "MB": peaks,
        "products": products(*given[:2]),
    }


def peers_of(name: str, found: dict) -> list[str]:
    """Those that compute what a plan computes, from the fastest."""
    group = TRAINED if name in TRAINED else FROZEN
    others = (other for other in group if other not in PLANS)
    return sorted(others, key=lambda other: statistics.median(found["s"][other]))


def losses(name: str, found: dict, chunked: bool) -> list[str]:
    """Peers that are faster in four turns of five, or leaner. Who asks for chunks gives time for
    memory, so that there a faster peer must be no larger.
    """
    lost = []
    for peer in peers_of(name, found):
        turns = zip(found["s"][peer], found["s"][name], strict=True)
        is_faster = sum(theirs < ours for theirs, ours in turns) >= 0.8 * REPEATS
        if is_faster and not (chunked and found["MB"][peer] > found["MB"][name]):
            theirs, ours = (statistics.median(found["s"][n]) for n in (peer, name))
            lost.append(f"slower than {peer}, {ours:.3f} and {theirs:.3f} s")
        if found["MB"][name] > 1.02 * found["MB"][peer] + TILE_MB:
            theirs, ours = (found["MB"][n] for n in (peer, name))
            lost.append(f"takes more than {peer}, {ours:.0f} and {theirs:.0f} MB")
    return lost


def told(name: str, found: dict) -> str:
    middle, peak = statistics.median(found["s"][name]), found["MB"][name]
    line = (
        f"{name:<34} {middle:6.3f} s ({min(found['s'][name]):.3f} to {max(found['s'][name]):.3f})"
    )
    line += f"  +{peak:,.0f} MB"
    if name in PLANS:
        ruler = found["products"][0 if name in TRAINED else 1]
        ratios = (
            f"{statistics.median(found['s'][peer]) / middle:.2f}x {peer.removesuffix(FROZEN_HEAD)}"
            for peer in peers_of(name, found)
        )
        line += f"  {middle / ruler:.2f} x the products, {', '.join(ratios)}"
    return line


def gate() -> int:
    """Every case in a process of its own; the number of times that a peer beats a plan."""
    lost = 0
    for isa, dtype, sizes in itertools.product(ISAS, DTYPES, GATE):
        is_slow = dtype == "float16" or (dtype == "bfloat16" and isa != "native")
        case = argparse.Namespace(**sizes, vocabulary=SLOW if is_slow else 32_000, dtype=dtype)
        command = [sys.executable, __file__, "--case", *options(case)]
        done = subprocess.run(
            command, env={**os.environ, **ISAS[isa]}, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        named = f"{isa}, {' '.join(options(case))}"
        print(f"--- {named}")
        for name in WAYS:
            print(told(name, found), flush=True)
        for name in PLANS:
            # Logits a second time are what `recompute` is told to spend where there are chunks.
            if name == "recompute" and case.chunk_rows:
                continue
            for loss in losses(name, found, bool(case.chunk_rows)):
                lost += 1
                print(f"LOST {named}: {name} {loss}", flush=True)
    return lost


def rows_of(found: dict, arguments: argparse.Namespace) -> list[str]:
    shape = f"{arguments.rows} x {arguments.hidden} x {arguments.vocabulary} {arguments.dtype}"
    chunk_rows = arguments.chunk_rows
    shape += f", chunks of {chunk_rows}" if chunk_rows else ", one chunk"
    command = " ".join(["python benches/linear.py --record", *options(arguments)])
    lines = []
    for name in PLANS:
        peers = peers_of(name, found)
        middle = {n: statistics.median(found["s"][n]) for n in (name, *peers)}
        ruler = found["products"][0 if name in TRAINED else 1]
        cells = (
            str(date.today()),
            commit(),
            f"{device()}, torch {torch.__version__}, Python {sys.version.split()[0]}",
            f"head and DPO loss, plan `{name}`, {shape}, forward + backward, 1 thread, peak "
            f"+{found['MB'][name]:,.0f} MB; products alone {ruler:.3f} s",
            f"{middle[name]:.3f} s ({min(found['s'][name]):.3f} to {max(found['s'][name]):.3f})",
            ", ".join(f"{n} {middle[n]:.3f} s, +{found['MB'][n]:,.0f} MB" for n in peers),
            f"{middle[peers[0]] / middle[name]:.2f}x faster than {peers[0]}",
            f"`{command}`",
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--gate", action="store_true", help="fail where an eager peer wins")
    parser.add_argument("--rows", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--chunk-rows", type=int, help="default: one chunk of 1.1 GB")
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.gate:
        return 1 if gate() else 0
    verify()
    found = measure(arguments)
    if arguments.case:
        print(json.dumps(found))
        return 0
    print("verified against float64")
    for name in WAYS:
        print(told(name, found))
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(rows_of(found, arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
