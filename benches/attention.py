"""What does attention over packed and shared rows cost on the CPU, beside padded rows?

Verifies hidden states and gradients of every way against padded rows first. Then forward + backward
of a Llama's layers alone, random pairs up to a length, every way in turn in one process, in its own
CPU time; then each once more in a process of its own, for its peak memory beyond model and inputs.
`packed, dense` is transformers' SDPA with its mask of a whole row. `--row` instead takes one row of
so many tokens in segments of 500, and of half as many. `--record` appends lines to RESULTS.md.

    python benches/attention.py [--record] [--longest 128 256 512 1024] [--pairs 16] [--row 32000]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from dpo_ext import PairDataset
from dpo_ext.torch import use_segment_attention

REPEATS, WARM_UP, SEGMENT = 5, 1, 500
# The dense mask takes minutes beyond this length, and part in two rounds up to it.
DENSE, DENSE_LONGEST, DENSE_ROUNDS = "packed, dense", 128, 2
# Way: layout, and whether attention is ours.
WAYS = {
    "padded": ("padded", False),
    "packed, dense": ("packed", False),
    "packed": ("packed", True),
    "shared": ("shared", True),
}


def network(ours: bool) -> Any:
    """Four layers of a Llama, hidden size 128, without a head that matters."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=65536,
    )
    model = transformers.LlamaForCausalLM(config)
    return use_segment_attention(model) if ours else model


def pairs_of(count: int, longest: int) -> PairDataset:
    """Prompts and sides of a quarter to the whole of half the longest sequence."""
    rng = np.random.default_rng(0)

    def ids() -> list[list[int]]:
        lengths = rng.integers(longest // 8, longest // 2 + 1, count)
        return [rng.integers(1, 1000, n).tolist() for n in lengths]

    return PairDataset.from_ids(ids(), ids(), ids(), pad_id=0)


def batch_of(way: str, pairs: PairDataset) -> Any:
    """All pairs in one batch, packed in one row."""
    layout, _ = WAYS[way]
    if layout == "padded":
        return pairs.plan(layout="padded", pairs_per_batch=len(pairs), shuffle=False)[0].to()
    tokens = int(pairs.tokens.sum())
    return pairs.plan(layout=layout, tokens_per_batch=tokens, shuffle=False)[0].to()


def step(model: Any, batch: Any) -> tuple[float, Tensor]:
    """CPU seconds of one forward and backward pass, and the scored hidden states."""
    model.zero_grad()
    start = time.process_time()
    hidden = model.model(**batch.inputs_for(model)).last_hidden_state
    scored = hidden.flatten(0, 1)[batch.table.logit_rows]
    scored.pow(3).sum().backward()
    return time.process_time() - start, scored.detach()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def verify() -> None:
    pairs, expected = pairs_of(5, 200), None
    for way, (_, ours) in WAYS.items():
        model = network(ours)
        batch = batch_of(way, pairs)
        scored = step(model, batch)[1].split(batch.table.lengths.flatten().tolist())
        order = batch.pair_index.argsort().tolist()  # packing takes the longest pairs first
        found = [torch.cat([scored[2 * i + side] for i in order for side in (0, 1)])]
        found += gradients(model)
        expected = found if expected is None else expected
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def row(tokens: int) -> dict[str, Tensor]:
    """One row of segments of 500 tokens, as any packing collator makes it."""
    ids = torch.arange(tokens) * 7919 % 999 + 1
    return {"input_ids": ids[None], "position_ids": (torch.arange(tokens) % SEGMENT)[None]}


def row_step(model: Any, tokens: int) -> float:
    model.zero_grad()
    start = time.process_time()
    model.model(**row(tokens), use_cache=False).last_hidden_state.pow(3).sum().backward()
    return time.process_time() - start


def peak_megabytes(*arguments: str) -> float:
    """Peak memory of one pass beyond model and inputs, in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def one(arguments: argparse.Namespace) -> None:
    model = network(arguments.row is not None or WAYS[arguments.one][1])
    pairs = pairs_of(arguments.pairs, arguments.longest[0])
    batch = batch_of(arguments.one, pairs) if arguments.row is None else None
    step(model, batch_of("padded", pairs_of(1, 16)))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = _kilobytes("VmRSS")
    step(model, batch) if arguments.row is None else row_step(model, arguments.row)
    print((_kilobytes("VmHWM") - before) / 1e3)


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def spread(took: list[float]) -> str:
    return f"{statistics.median(took):.2f} s ({min(took):.2f} to {max(took):.2f})"


def lengths(arguments: argparse.Namespace) -> list[str]:
    """A line for each length: every way beside padded rows."""
    models = {way: network(ours) for way, (_, ours) in WAYS.items()}
    lines = []
    for longest in arguments.longest:
        pairs = pairs_of(arguments.pairs, longest)
        batches = {way: batch_of(way, pairs) for way in WAYS}
        fill = float(batches["padded"].attention_mask.float().mean())
        ways = [way for way in WAYS if way != DENSE or longest <= DENSE_LONGEST]
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(REPEATS + WARM_UP):
            for way in ways:
                if way == DENSE and repeat > DENSE_ROUNDS:
                    continue
                took, _ = step(models[way], batches[way])
                if repeat >= WARM_UP:
                    times[way].append(took)
        given = ("--longest", str(longest), "--pairs", str(arguments.pairs))
        peaks = {way: peak_megabytes("--one", way, *given) for way in ways}
        ratios = {
            way: statistics.median(a / b for a, b in zip(took, times["padded"], strict=False))
            for way, took in times.items()
        }
        for way, took in times.items():
            ratio = ratios[way]
            line = f"{spread(took)}, {ratio:.2f} of padded, {ratio / fill:.2f} of padded x fill"
            print(f"{longest:>6} {way:<14} {line}, peak +{peaks[way]:,.0f} MB")
        cells = [f"{longest}", f"{int(batches['packed'].input_ids.numel()):,}", f"{fill:.2f}"]
        cells += [
            f"{spread(times[way])}, +{peaks[way]:,.0f} MB" if way in ways else "" for way in WAYS
        ]
        cells.append(f"{ratios['packed'] / fill:.2f}")
        lines.append(f"| {' | '.join(cells)} |\n")
    head = ["longest", "tokens", "fill", *WAYS, "packed / (padded x fill), median of rounds"]
    return [f"| {' | '.join(head)} |\n", "| --- " * len(head) + "|\n", *lines]


def one_row(arguments: argparse.Namespace) -> list[str]:
    """Time and memory of one row, and of half of it."""
    model, tokens = network(True), arguments.row
    sizes = (tokens // 2, tokens)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(REPEATS + WARM_UP):
        for size in sizes:
            took = row_step(model, size)
            if repeat >= WARM_UP:
                times[size].append(took)
    half, whole = (statistics.median(times[size]) for size in sizes)
    peaks = [peak_megabytes("--one", "packed", "--row", str(size)) for size in sizes]
    said = [
        f"{size:,} tokens {spread(times[size])}, peak +{peak:,.0f} MB"
        for size, peak in zip(sizes, peaks, strict=True)
    ]
    line = f"One row, segments of {SEGMENT}: {'; '.join(said)}: {whole / half:.2f}x the time"
    print(line)
    return [f"{line}.\n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append lines to RESULTS.md")
    parser.add_argument("--longest", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--row", type=int, help="one row of so many tokens")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.one:
        one(arguments)
        return
    verify()
    print("verified against padded rows")
    lines = lengths(arguments) if arguments.row is None else one_row(arguments)
    if arguments.record:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch "
        where += f"{torch.__version__}, transformers {transformers.__version__}"
        asked = f" --row {arguments.row}" if arguments.row else f" --pairs {arguments.pairs}"
        title = f"\n{date.today()}, {commit}, {where}, Llama with 4 layers of 128, forward + "
        title += f"backward, 1 thread, CPU time, medians of {REPEATS}: "
        title += f"`python benches/attention.py{asked} --record`\n\n"
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines([title, *lines])


if __name__ == "__main__":
    main()
