"""What does the fused head cost on the CPU, beside `log_softmax(hidden @ W.T)`?

Verifies values and gradients against float64 on a small vocabulary first. Then forward + backward
of each plan and of the baseline, taking turns in one process, in its own time; then each once more
in a process of its own, for its peak memory beyond the inputs. `--chunk-rows` cuts the plans into
chunks, `--record` appends the rows to benches/RESULTS.md.

    python benches/linear.py [--record] [--rows 256] [--hidden 896] [--vocabulary 151936]
                             [--dtype float32] [--chunk-rows 256]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from dpo_ext.torch import ScoreTable, linear_preference_loss, linear_sequence_logps, preference_loss

REPEATS, WARM_UP = 5, 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAINED = ("torch", "recompute", "pairwise")
FROZEN = ("torch, frozen head", "frozen", "frozen, exact target")


def by_torch(hidden: Tensor, weight: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    """What a user writes."""
    logits = hidden @ weight.T
    logps = (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(-1)
    logps = logps.gather(1, table.targets.long()[:, None])[:, 0]
    return preference_loss(logps.view(table.n_sequences, -1).sum(1).view(-1, 2), ref).loss


def by_scores(hidden: Tensor, weight: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    return preference_loss(linear_sequence_logps(hidden, weight, table, **how), ref).loss


def by_pairs(hidden: Tensor, weight: Tensor, table: ScoreTable, ref: Tensor, how: dict) -> Tensor:
    return linear_preference_loss(hidden, weight, table, ref, **how).loss


WAYS: dict[str, tuple[Callable, dict]] = {
    "torch": (by_torch, {}),
    "recompute": (by_scores, {"plan": "recompute"}),
    "pairwise": (by_pairs, {"plan": "pairwise"}),
    "torch, frozen head": (by_torch, {}),
    "frozen": (by_scores, {"plan": "frozen"}),
    "frozen, exact target": (by_scores, {"plan": "frozen", "exact_target": True}),
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


def peak_megabytes(name: str, arguments: argparse.Namespace) -> float:
    """Peak memory of one pass beyond its inputs, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, *options(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(name: str, sizes: tuple[int, int, int], dtype: torch.dtype, chunk_rows: int | None) -> None:
    verify()  # loads what there is to load
    given = inputs(*sizes, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = _kilobytes("VmRSS")
    step(name, *given, chunk_rows)
    print((_kilobytes("VmHWM") - before) / 1e3)


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--rows", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--chunk-rows", type=int, help="default: one chunk of 1.1 GB")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (arguments.rows, arguments.hidden, arguments.vocabulary)
    dtype, chunk_rows = DTYPES[arguments.dtype], arguments.chunk_rows
    if arguments.one:
        one(arguments.one, sizes, dtype, chunk_rows)
        return
    verify()
    print("verified against float64")
    given = inputs(*sizes, dtype)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(REPEATS + WARM_UP):
        for name in WAYS:
            took, _ = step(name, *given, chunk_rows)
            if repeat >= WARM_UP:
                times[name].append(took)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch "
    where += f"{torch.__version__}, Python {sys.version.split()[0]}"
    shape = f"{sizes[0]} x {sizes[1]} x {sizes[2]} {arguments.dtype}"
    shape += f", chunks of {chunk_rows}" if chunk_rows else ", one chunk"
    command = " ".join(["python benches/linear.py --record", *options(arguments)])
    lines = []
    for group in (TRAINED, FROZEN):
        base = statistics.median(times[group[0]])
        for name in group:
            took = times[name]
            middle, peak = statistics.median(took), peak_megabytes(name, arguments)
            spread = f"{middle:.2f} s ({min(took):.2f} to {max(took):.2f})"
            print(f"{name:<20} {spread}  {base / middle:.2f}x  peak +{peak:,.0f} MB")
            if name == group[0]:
                theirs = f"{name} {spread}, peak +{peak:,.0f} MB"
                continue
            what = f"head and DPO loss, plan `{name}`, {shape}, forward + backward, 1 thread"
            cells = (
                str(date.today()),
                commit,
                where,
                f"{what}, peak +{peak:,.0f} MB",
                spread,
                theirs,
                f"{base / middle:.2f}x faster",
                f"`{command}`",
            )
            lines.append(f"| {' | '.join(cells)} |\n")
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(lines)


if __name__ == "__main__":
    main()
