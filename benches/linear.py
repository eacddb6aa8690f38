"""What does the fused head cost on the CPU, beside `log_softmax(hidden @ W.T)`?

Verifies values and gradients against float64 on a small vocabulary first. Then forward + backward
of each plan and of the baseline, taking turns in one process, in its own time; then each once more
in a process of its own, for its peak memory beyond the inputs. `--record` appends the rows to
benches/RESULTS.md.

    python benches/linear.py [--record] [--rows 256] [--hidden 896] [--vocabulary 151936]
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
TRAINED = ("torch", "recompute", "pairwise")
FROZEN = ("torch, frozen head", "frozen")


def by_torch(hidden: Tensor, weight: Tensor, table: ScoreTable, ref: Tensor, plan: str) -> Tensor:
    """What a user writes."""
    logps = (hidden @ weight.T).log_softmax(-1)
    logps = logps.gather(1, table.targets.long()[:, None])[:, 0]
    return preference_loss(logps.view(table.n_sequences, -1).sum(1).view(-1, 2), ref).loss


def by_scores(hidden: Tensor, weight: Tensor, table: ScoreTable, ref: Tensor, plan: str) -> Tensor:
    logps = linear_sequence_logps(hidden, weight, table, plan=plan)
    return preference_loss(logps, ref).loss


def by_pairs(hidden: Tensor, weight: Tensor, table: ScoreTable, ref: Tensor, plan: str) -> Tensor:
    return linear_preference_loss(hidden, weight, table, ref, plan=plan).loss


WAYS: dict[str, Callable] = {
    "torch": by_torch,
    "recompute": by_scores,
    "pairwise": by_pairs,
    "torch, frozen head": by_torch,
    "frozen": by_scores,
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


def step(name: str, x: Tensor, w: Tensor, table: ScoreTable, ref: Tensor) -> tuple[float, list]:
    """Seconds of one forward and backward pass, and the gradients."""
    hidden, weight = x.detach().requires_grad_(), w.detach().requires_grad_(name in TRAINED)
    start = time.process_time()
    WAYS[name](hidden, weight, table, ref, name).backward()
    return time.process_time() - start, [hidden.grad, weight.grad]


def verify() -> None:
    x, w, table, ref = inputs(64, 32, 501, torch.float32)
    _, exact = step("torch", x.double(), w.double(), table, ref.double())
    for name in WAYS:
        _, grads = step(name, x, w, table, ref)
        for got, want in zip(grads, exact, strict=True):
            if got is not None:
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def peak_megabytes(name: str, sizes: tuple[int, int, int]) -> float:
    """Peak memory of one pass beyond its inputs, in a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    for option, size in zip(("--rows", "--hidden", "--vocabulary"), sizes, strict=True):
        command += [option, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(name: str, sizes: tuple[int, int, int]) -> None:
    verify()  # loads what there is to load
    given = inputs(*sizes, torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = _kilobytes("VmRSS")
    step(name, *given)
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
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (arguments.rows, arguments.hidden, arguments.vocabulary)
    if arguments.one:
        one(arguments.one, sizes)
        return
    verify()
    print("verified against float64")
    given = inputs(*sizes, torch.float32)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(REPEATS + WARM_UP):
        for name in WAYS:
            took, _ = step(name, *given)
            if repeat >= WARM_UP:
                times[name].append(took)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch "
    where += f"{torch.__version__}, Python {sys.version.split()[0]}"
    shape = f"{sizes[0]} x {sizes[1]} x {sizes[2]} float32"
    lines = []
    for group in (TRAINED, FROZEN):
        base = statistics.median(times[group[0]])
        for name in group:
            took = times[name]
            middle, peak = statistics.median(took), peak_megabytes(name, sizes)
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
                "`python benches/linear.py --record`",
            )
            lines.append(f"| {' | '.join(cells)} |\n")
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(lines)


if __name__ == "__main__":
    main()
