"""What does a store of reference log-probs cost: to write, to read, in a step; its fingerprint?

Each answer is checked before its time counts. Times are the fastest of a few turns, as other work
on the machine only adds; CPU seconds stand beside them. Beside ours: the same columns written and
read by pyarrow alone, without keys, checks or durability. `--record` appends rows to RESULTS.md.

    python benches/store.py [--record] [--rows 1000000] [--many 10000000] [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ext import PairDataset, Ragged
from dpo_ext.reflogps import ReferenceStore, fingerprint

# In a process of its own: what is resident there counts.
MANY = """
import json, sys, time
from dpo_ext import PairDataset
from dpo_ext.reflogps import ReferenceStore

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(key))

pairs = PairDataset.load(sys.argv[1], verify=False)
store = ReferenceStore(sys.argv[2], fingerprint="bench")
times = []
for _ in range(2):
    start = time.perf_counter(), time.process_time()
    missing = store.missing(pairs)
    times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
print(json.dumps({"missing": len(missing), "times": times, "gb": resident("VmHWM")}))
"""
FINGERPRINT = """
import json, os, sys, time
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
from dpo_ext.reflogps import fingerprint
fingerprint(sys.argv[1], notes=False)
times = []
for _ in range(3):
    start = time.perf_counter(), time.process_time()
    fingerprint(sys.argv[1], notes=False)
    times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
print(json.dumps(times))
"""


def random_pairs(n: int, longest: int, seed: int = 0) -> PairDataset:
    """Pairs whose prompts and completions have 1 to `longest` tokens."""
    rng = np.random.default_rng(seed)

    def lists() -> Ragged:
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(rng.integers(1, longest + 1, n), out=offsets[1:])
        return Ragged(rng.integers(0, 50_000, offsets[-1], dtype=np.int32), offsets)

    return PairDataset.from_ids(lists(), lists(), lists())


def values_of(pairs: PairDataset) -> np.ndarray:
    """Made up, the same for equal sequences."""
    sums = np.stack(
        [
            [np.add.reduceat(ragged.values.astype(np.int64), ragged.offsets[:-1])]
            for ragged in (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
        ]
    ).reshape(3, -1)
    return -np.stack([sums[0] + 7 * sums[1], sums[0] + 7 * sums[2]], axis=1) / 1e4


def fastest(turns: int, work: Callable[[int], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of the fastest turn."""
    times = []
    for turn in range(turns):
        start = time.perf_counter(), time.process_time()
        work(turn)
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return min(times)


def child(code: str, *arguments: Path) -> Any:
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def write_and_read(rows: int, turns: int, folder: Path) -> list[tuple[str, str, str, str]]:
    pairs = random_pairs(rows // 2, 200)
    values = values_of(pairs)
    tokens = int(pairs.tokens.sum())

    def store(turn: int) -> ReferenceStore:
        return ReferenceStore(folder / str(turn), fingerprint="bench")

    put = fastest(turns, lambda turn: store(turn).put(pairs, values))
    distinct = store(0).stats.rows
    assert store(0).get(pairs).tobytes() == values.tobytes()
    read = fastest(turns, lambda turn: store(0).get(pairs))
    keys = [os.urandom(16) for _ in range(rows)]
    table = pa.table([pa.array(keys, pa.binary(16)), pa.array(values.ravel())], names=["k", "v"])
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    peer = fastest(turns, lambda turn: pq.write_table(table, folder / f"{turn}.p", **options))
    peer_read = fastest(turns, lambda turn: pq.read_table(folder / "0.p"))
    size = sum(path.stat().st_size for path in (folder / "0").iterdir())
    loaded = store(0)
    loaded.get(pairs)
    plan = pairs.plan(layout="padded", pairs_per_batch=64, seed=1)
    warm, cold = [], []
    rng = np.random.default_rng(0)
    for i in range(1000):
        # A step has just made its batch, so that the ids are at hand; where they are not, waiting
        # for memory is most of it.
        for index, times in ((plan[i].pair_index, warm), (rng.integers(0, len(pairs), 64), cold)):
            start = time.perf_counter()
            found = loaded.get(pairs, index=index)
            times.append(time.perf_counter() - start)
            assert np.array_equal(found, values[index])
    what = f"{distinct:,} rows, {tokens / 1e6:.0f} M tokens"
    step, waits = (f"{statistics.median(t) * 1e6:.1f} us median" for t in (warm, cold))
    best = sorted(warm)[100] * 1e6
    return [
        row(f"write: {what}", put, 2, ("pyarrow alone", peer)),
        row(f"read (open, check, find): {what}", read, 0.2, ("pyarrow alone", peer_read)),
        (
            "bytes a row, manifest included",
            f"{size / distinct:.2f}",
            "24 of key and value",
            verdict(size / distinct, 40),
        ),
        (
            "a read in a training step, 64 pairs of 300 tokens",
            f"{step}, {best:.1f} us the fastest tenth",
            f"pairs from anywhere in memory: {waits}",
            verdict(best, 50),
        ),
    ]


def row(
    name: str, ours: tuple[float, float], target: float, peer: tuple[str, tuple[float, float]]
) -> tuple[str, str, str, str]:
    theirs = f"{peer[0]}: {peer[1][0]:.3f} s"
    return name, f"{ours[0]:.3f} s, {ours[1]:.3f} CPU-s", theirs, verdict(ours[0], target)


def verdict(found: float, most: float) -> str:
    return f"target {most:g}: {'met' if found <= most else 'missed'}"


def of_safetensors(folder: Path) -> tuple[str, str, str, str]:
    import hashlib

    import torch
    from safetensors.torch import save_file

    tensors = {f"layer.{i}": torch.randn(8192, 4096, dtype=torch.bfloat16) for i in range(15)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    size = (folder / "model.safetensors").stat().st_size
    block = bytes(256 << 20)
    plain = fastest(3, lambda _: hashlib.sha256(block).digest())
    wall, cpu = min(child(FINGERPRINT, folder))
    rate = size / 1e9 / cpu
    assert fingerprint(folder, notes=folder / "notes") == fingerprint(folder, notes=False)
    return (
        f"fingerprint of {size / 1e9:.2f} GB of safetensors, one core",
        f"{rate:.2f} GB a CPU-s, {size / 1e9 / wall:.2f} GB/s",
        f"SHA-256 of memory: {len(block) / 1e9 / plain[1]:.2f} GB/s",
        f"target 1: {'met' if rate >= 1 else 'missed'}",
    )


def of_many(rows: int, folder: Path) -> list[tuple[str, str, str, str]]:
    pairs = random_pairs(rows // 2, 60, seed=1)
    values = values_of(pairs)
    pairs.save(folder / "pairs")
    store = ReferenceStore(folder / "store", fingerprint="bench")
    step = 500_000
    for start in range(0, len(pairs) - step // 10, step):
        part = np.arange(start, min(start + step, len(pairs) - step // 10))
        store.put(pairs, values[part], index=part)
    held = store.stats.rows
    expected = store.missing(pairs)
    assert 0 < len(expected) <= step // 10
    size = (folder / "pairs").stat().st_size + sum(
        path.stat().st_size for path in (folder / "pairs").iterdir()
    )
    del store, pairs, values
    found = child(MANY, folder / "pairs", folder / "store")
    assert found["missing"] == len(expected)
    (cold, cold_cpu), (warm, _) = found["times"]
    name = f"{held:,} rows in {len(list((folder / 'store').glob('*.parquet')))} shards"
    return [
        (
            f"`missing()` of a mapped data set of {size / 1e9:.1f} GB, {name}",
            f"{cold:.2f} s with the opening ({cold_cpu:.2f} CPU-s), {warm:.2f} s again",
            "",
            verdict(cold, 5),
        ),
        (
            f"resident memory of that, {name}",
            f"{found['gb']:.2f} GB",
            "",
            verdict(found["gb"], 1.5),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--many", type=int, default=10_000_000)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = []
    for measure in (
        lambda folder: write_and_read(arguments.rows, arguments.turns, folder),
        lambda folder: [of_safetensors(folder / "model")],
        lambda folder: of_many(arguments.many, folder),
    ):
        folder = Path(tempfile.mkdtemp())
        try:
            for cells in measure(folder):
                rows.append(cells)
                print(" | ".join(cells), flush=True)
        finally:
            shutil.rmtree(folder)
    if arguments.record:
        record(rows, load)


def record(rows: list[tuple[str, str, str, str]], load: float) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    title = (
        f"{date.today()}, {commit}, {platform.machine()}, {os.cpu_count()} CPUs, load {load:.1f}"
    )
    title += f", pyarrow {pa.__version__}, Python {sys.version.split()[0]}, reference store: "
    title += "`python benches/store.py --record`"
    head = "| | ours | beside | |\n| --- | --- | --- | --- |\n"
    with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{title}\n\n{head}")
        file.writelines(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    main()
