"""How fast are log-probs of given logits on the CPU, beside torch's `log_softmax` and `gather`?

Verifies values and gradients against float64 first, then times forward + backward in the same
process, taking turns. Times are the process's own (system time for page faults included), which
other processes do not stop. `--record` appends a row a case to benches/RESULTS.md.

    python benches/logps.py [--record] [--rows 192] [--vocabulary 128256] [--threads 1]
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

from dpo_ext.torch import ScoreTable, sequence_logps

REPEATS, WARM_UP = 20, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def baseline(logits: Tensor, table: ScoreTable) -> Tensor:
    """What a user writes: the rows upcast, their log-softmax, one column of each, summed."""
    logps = logits.float().log_softmax(-1).gather(1, table.targets.long()[:, None])[:, 0]
    return logps.view(table.n_sequences, -1).sum(1).view(-1, 2)


def ours(logits: Tensor, table: ScoreTable) -> Tensor:
    return sequence_logps(logits, table)


def ours_in_place(logits: Tensor, table: ScoreTable) -> Tensor:
    return sequence_logps(logits, table, inplace_grad=True)


def step(function: Callable, leaf: Tensor, table: ScoreTable, upstream: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    # A model's logits are no leaf; `detach` makes one of the same memory, and a no-op of it a node
    # that an in-place gradient may overwrite.
    logits = leaf.detach().requires_grad_()
    node = logits.view(logits.shape)
    start = time.process_time()
    function(node, table).backward(upstream)
    return time.process_time() - start


def verify(values: Tensor, table: ScoreTable, upstream: Tensor) -> float:
    """Largest error of a token's log-prob and of the gradient against float64, both checked."""
    sample = slice(0, 8)
    exact = values[sample].double().requires_grad_()
    logps = exact.log_softmax(-1).gather(1, table.targets[sample].long()[:, None])[:, 0]
    scores = torch.ops.dpo_ext.token_stats(
        values[sample].contiguous(), torch.arange(8), table.targets[sample], 1.0, 0.0, 1.0, False
    )
    error = (scores[0] - logps).abs().max().item()
    assert error <= 4e-6, error
    per_sequence = len(values) // table.n_sequences
    logps.backward(upstream.reshape(-1).repeat_interleave(per_sequence)[sample].double())
    allowed = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[values.dtype]
    for function in (ours, ours_in_place):
        logits = values.clone().requires_grad_()
        function(logits.view(logits.shape), table).backward(upstream)
        off = (logits.grad[sample].double() - exact.grad).abs().max().item()
        assert off <= allowed, (function.__name__, off)
    return error


def measure(dtype: torch.dtype, rows: int, vocabulary: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)
    table = ScoreTable(
        logit_rows=torch.arange(rows),
        targets=torch.randint(0, vocabulary, (rows,), generator=generator, dtype=torch.int32),
        seq_offsets=torch.arange(0, rows + 1, rows // 2, dtype=torch.int32),
    )
    upstream = torch.tensor([[0.5, -1.5]])
    error = verify(values, table, upstream)
    print(f"verified: token log-probs within {error:.1e} of float64")
    times: dict[str, list[float]] = {f.__name__: [] for f in (baseline, ours, ours_in_place)}
    scratch = values.clone()
    for repeat in range(REPEATS + WARM_UP):
        for function in (baseline, ours, ours_in_place):
            scratch.copy_(values)
            took = step(function, scratch, table, upstream)
            if repeat >= WARM_UP:
                times[function.__name__].append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--rows", type=int, default=192, help="an even number of at least 8")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = []
    for name, dtype in DTYPES.items():
        times = measure(dtype, arguments.rows, arguments.vocabulary)
        base = statistics.median(times["baseline"])
        logits_bytes = arguments.rows * arguments.vocabulary * dtype.itemsize
        # Read forward, read and written backward; torch's own traffic is several times that.
        gigabytes = 3 * logits_bytes / 1e9
        for function, took in times.items():
            low, middle, high = (
                statistics.quantiles(took, n=10)[i] if i != 4 else statistics.median(took)
                for i in (0, 4, 8)
            )
            print(
                f"{name:<9} {function:<14} {middle * 1e3:8.1f} ms ({low * 1e3:.1f} to "
                f"{high * 1e3:.1f})  {gigabytes / middle:6.2f} GB/s  {base / middle:5.1f}x"
            )
            if function != "baseline":
                lines.append(row(arguments, name, function, (low, middle, high), base, gigabytes))
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(lines)


def row(arguments, dtype: str, function: str, took: tuple, base: float, gigabytes: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    low, middle, high = (t * 1e3 for t in took)
    what = {"ours": "sequence_logps", "ours_in_place": "sequence_logps, inplace_grad"}[function]
    command = f"python benches/logps.py --record --rows {arguments.rows}"
    command += f" --vocabulary {arguments.vocabulary} --threads {arguments.threads}"
    return (
        f"| {date.today()} | {commit} | {processor}, {os.cpu_count()} CPUs, torch "
        f"{torch.__version__}, Python {sys.version.split()[0]} | {what}, {arguments.rows} x "
        f"{arguments.vocabulary} {dtype}, forward + backward, {arguments.threads} thread(s), "
        f"{gigabytes:.2f} GB at {gigabytes / middle * 1e3:.2f} GB/s | {middle:.1f} ms ({low:.1f} "
        f"to {high:.1f}) | log_softmax + gather {base * 1e3:.1f} ms | "
        f"{base * 1e3 / middle:.1f}x faster | `{command}` |\n"
    )


if __name__ == "__main__":
    main()
