"""How fast are batches filled and bins packed, beside TRL's collator and TRL's packing?

Verifies each result against the peer's first, then times both in the same process, taking turns, on
one thread. The ids and lengths are those of HH pairs if the file and the tokenizer are given, else
log-normal ones like them. `--record` appends a row a case to benches/RESULTS.md.

    python benches/batch.py [--record] [--data harmless-test.jsonl.gz --tokenizer qwen2.5]
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

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow as pa
import torch
import transformers
import trl
from trl.data_utils import _pack_bfd
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_ext import PairDataset, Tokenizer, pack_lengths
from dpo_ext.torch.ring import Ring

PAIRS, WIDTH, CAPACITY = 64, 777, 2048
Times = dict[str, list[float]]


def dataset(arguments: argparse.Namespace) -> PairDataset:
    if arguments.data:
        tokenizer = Tokenizer.from_pretrained(arguments.tokenizer)
        return PairDataset.from_files(arguments.data, tokenizer, on_bad="skip", max_length=None)
    random = np.random.default_rng(0)
    n = 2312

    def sides(mean: float, spread: float) -> list[np.ndarray]:
        lengths = np.exp(random.normal(mean, spread, n)).clip(1, 500).astype(int)
        return [random.integers(0, 151_665, k) for k in lengths]

    return PairDataset.from_ids(sides(4.4, 0.8), sides(3.4, 0.9), sides(3.4, 0.9))


def turns(repeats: int, functions: dict[str, Callable[[], object]]) -> Times:
    times: Times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def batch_of_width(pairs: PairDataset) -> PairDataset:
    """64 random pairs and, in place of the last, one whose longest side has 777 tokens."""
    chosen = np.random.default_rng(1).permutation(np.flatnonzero(pairs.longest <= WIDTH))[:PAIRS]
    columns = [
        [ids[int(i)] for i in chosen]
        for ids in (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
    ]
    room = WIDTH - len(columns[0][-1])
    columns[1][-1] = np.resize(columns[1][-1], room)
    return PairDataset.from_ids(*columns)


def filling(pairs: PairDataset) -> Times:
    batch_pairs = batch_of_width(pairs)
    plan = batch_pairs.plan(layout="padded", pairs_per_batch=PAIRS, shuffle=False)
    rows = [{k: v.tolist() for k, v in pair.items()} for pair in batch_pairs]
    collate = DataCollatorForPreference(pad_token_id=batch_pairs.pad_id)
    want, got = collate(rows), plan[0]
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(torch.from_numpy(getattr(got, name)), want[name]), name
    ring = Ring(2)

    def reused() -> None:
        loan = ring.lend()
        plan.build(0, loan.take)
        loan.end()

    times: Times = {"TRL collator": [], "fresh memory": [], "reused buffers": []}
    # Ours many times for each of the peer's: a tenth of a millisecond is easily disturbed.
    for _ in range(20):
        for name, function, times_each in (
            ("TRL collator", lambda: collate(rows), 1),
            ("fresh memory", lambda: plan[0], 20),
            ("reused buffers", reused, 20),
        ):
            for _ in range(times_each):
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    print(f"verified: tensors of {tuple(got.input_ids.shape)} equal to the collator's")
    return times


def packing(pairs: PairDataset, million: int) -> tuple[Times, int]:
    lengths = np.resize(pairs.tokens[pairs.tokens <= CAPACITY], million).astype(np.int32)
    np.random.default_rng(2).shuffle(lengths)
    ours = pack_lengths(lengths, CAPACITY)
    # One byte an id, all 0: the peer moves the ids too, but spends its time on the bins.
    ids = pa.ListArray.from_arrays(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        pa.array(np.zeros(int(lengths.sum()), np.int8)),
    )
    table = pa.table({"input_ids": ids})
    start = time.perf_counter()
    theirs = _pack_bfd(table, CAPACITY)
    peer = time.perf_counter() - start
    used = np.sort(np.add.reduceat(lengths[ours.values], ours.offsets[:-1]))
    assert np.array_equal(np.sort(ours.values), np.arange(million))
    assert np.array_equal(used, np.sort(np.diff(theirs["input_ids"].chunks[0].offsets)))
    print(f"verified: {len(ours):,} bins, filled as TRL's are, token for token")
    times = turns(20, {"pack_lengths": lambda: pack_lengths(lengths, CAPACITY)})
    return {**times, "TRL bfd": [peer]}, len(ours)


def spread(times: list[float]) -> tuple[float, float, float]:
    if len(times) == 1:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10)
    return tenths[0], statistics.median(times), tenths[8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--data", help="JSONL of pairs")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, with --data")
    parser.add_argument("--lengths", type=int, default=1_000_000, help="how many to pack")
    arguments = parser.parse_args()
    if bool(arguments.data) != bool(arguments.tokenizer):
        parser.error("--data and --tokenizer go together")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    pairs = dataset(arguments)
    shape = f"{2 * PAIRS} x {WIDTH}"
    fill = filling(pairs)
    pack, bins = packing(pairs, arguments.lengths)
    cases = [
        (f"padded batch of {PAIRS} pairs, {shape}, reused buffers", fill, "reused buffers"),
        (f"padded batch of {PAIRS} pairs, {shape}, fresh memory", fill, "fresh memory"),
        (
            f"pack_lengths, {arguments.lengths:,} pairs into {bins:,} bins of {CAPACITY}",
            pack,
            "pack_lengths",
        ),
    ]
    lines = []
    for what, times, name in cases:
        peer = next(other for other in times if other.startswith("TRL"))
        low, middle, high = (t * 1e3 for t in spread(times[name]))
        base = statistics.median(times[peer]) * 1e3
        ours = f"{middle:.3f} ms ({low:.3f} to {high:.3f})"
        print(f"{what}: {ours}, {peer} {base:.1f} ms, {base / middle:.0f}x faster")
        lines.append(row(arguments, what, ours, f"{peer} {base:.1f} ms", base / middle))
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(lines)


def row(arguments: argparse.Namespace, what: str, ours: str, peer: str, ratio: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    source = "log-normal lengths"
    command = "python benches/batch.py --record"
    if arguments.data:
        data, tokenizer = Path(arguments.data).name, Path(arguments.tokenizer).name
        source = f"HH {data}, {tokenizer}"
        command += f" --data {data} --tokenizer {tokenizer}"
    return (
        f"| {date.today()} | {commit} | {processor}, {os.cpu_count()} CPUs, torch "
        f"{torch.__version__}, trl {trl.__version__}, Python {sys.version.split()[0]} | {what}, "
        f"{source}, 1 thread | {ours} | {peer} | {ratio:.0f}x faster | `{command}` |\n"
    )


if __name__ == "__main__":
    main()
