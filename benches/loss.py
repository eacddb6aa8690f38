"""What does `preference_loss` cost beside the line of PyTorch that it replaces?

Verifies the value and the gradient first, then times both in the same process, taking turns, so
that a busy machine slows both. `--record` appends a row a size to benches/RESULTS.md.

    python benches/loss.py [--record]
"""

from __future__ import annotations

import argparse
import gc
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
from torch.nn.functional import logsigmoid

from dpo_ext.torch import preference_loss

BETA = 0.1
REPEATS = 30


def by_hand(logps: Tensor, ref_logps: Tensor) -> Tensor:
    chosen, rejected = logps[:, 0] - ref_logps[:, 0], logps[:, 1] - ref_logps[:, 1]
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def ours(logps: Tensor, ref_logps: Tensor) -> Tensor:
    return preference_loss(logps, ref_logps, beta=BETA).loss


def ours_with_metrics(logps: Tensor, ref_logps: Tensor) -> Tensor:
    out = preference_loss(logps, ref_logps, beta=BETA)
    _ = out.metrics
    return out.loss


def verify(logps: Tensor, ref_logps: Tensor) -> None:
    """Value and gradient against the line by hand in float64."""
    leaf = logps.detach().double().requires_grad_()
    want = by_hand(leaf, ref_logps.double())
    want.backward()
    got = ours(logps, ref_logps)
    got.backward()
    error = (logps.grad - leaf.grad).abs().max().item() * len(logps)
    assert abs(got.item() - want.item()) < 2e-6, (got.item(), want.item())
    assert error < 1e-6, error
    logps.grad = None


def seconds(function: Callable[..., Tensor], logps: Tensor, ref_logps: Tensor, calls: int) -> float:
    """Seconds of one forward and backward pass; the process's own time, which other processes do
    not move.
    """
    start = time.process_time()
    for _ in range(calls):
        function(logps, ref_logps).backward()
        logps.grad = None
    return (time.process_time() - start) / calls


def measure(pairs: int, calls: int) -> dict[str, tuple[float, float]]:
    """Microseconds of each function: median and the lowest of the repeats."""
    generator = torch.Generator().manual_seed(0)
    ref = -torch.rand(pairs, 2, generator=generator) * 400
    logps = (ref + torch.randn(pairs, 2, generator=generator) * 3).requires_grad_()
    verify(logps, ref)
    functions = (by_hand, ours, ours_with_metrics)
    times: dict[str, list[float]] = {f.__name__: [] for f in functions}
    gc.disable()
    for repeat in range(REPEATS + 3):
        for function in functions:
            took = seconds(function, logps, ref, calls) * 1e6
            if repeat >= 3:
                times[function.__name__].append(took)
    gc.enable()
    return {name: (statistics.median(took), min(took)) for name, took in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for pairs, calls in ((64, 200), (1_000_000, 1)):
        result = measure(pairs, calls)
        hand = result["by_hand"]
        for name in ("ours", "ours_with_metrics"):
            median, low = result[name]
            ratio = median / hand[0]
            print(
                f"{pairs:>9} pairs  {name:<18} {median:10.1f} us (min {low:.1f})  by hand "
                f"{hand[0]:10.1f} us (min {hand[1]:.1f})  ratio {ratio:.2f}"
            )
            rows.append((pairs, name, median, low, hand, ratio))
    if arguments.record:
        record(rows)


def record(rows: list[tuple]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    where = f"{machine}, torch {torch.__version__}"
    path = Path(__file__).parent / "RESULTS.md"
    lines = []
    for pairs, name, median, low, hand, ratio in rows:
        what = {"ours": "preference_loss", "ours_with_metrics": "preference_loss + metrics"}[name]
        lines.append(
            f"| {date.today()} | {commit} | {where}, Python {sys.version.split()[0]} | {what}, "
            f"{pairs} pairs, float32, forward + backward, one thread | {median:.1f} us (min "
            f"{low:.1f}) | by hand {hand[0]:.1f} us (min {hand[1]:.1f}) | {ratio:.2f}x | `python "
            "benches/loss.py --record` |\n"
        )
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


if __name__ == "__main__":
    main()
