"""How well would encoding fill more threads than this machine has cores?

The pieces that threads take are timed one by one, in CPU seconds of one thread, and the rules by
which `rust/encode/desk.rs` hands them out are played through for more threads: one reads at a time,
one puts together at a time, nobody waits. Efficiency is the time of one thread over n times that of
n threads. It knows nothing of memory, caches and clocks that several cores share, so it is a bound
and is called predicted; what two threads take on this machine is measured beside it.

    python benches/threads.py FILE TOKENIZER [--copies 40] [--record]
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import os
import platform
import statistics
import tempfile
import time
from collections import deque
from datetime import date
from pathlib import Path

import dpo_ext
from dpo_ext import PairDataset, Tokenizer, _core
from dpo_ext.data.options import settings

THREADS = (2, 4, 8, 16, 32, 64)
REPEATS = 5
LOCK = 1e-6
"""Seconds of a thread between two pieces."""
BYTES_A_SECOND = 2e9
"""Of putting ids behind others."""


def pieces(file: Path, tokenizer: Tokenizer) -> tuple[list[float], float, list[int]]:
    """CPU seconds of each piece and of all reading, and bytes of ids of each piece.

    With one thread, a part that need hold one pair is one piece. Before one in each block the next
    block is read: those are the dearest calls, and what they take beyond a usual one is reading.
    """
    options = settings({"threads": 1, "on_bad": "skip"})
    runs = []
    for _ in range(REPEATS):
        encoder, times, sizes = _core.FileEncoder([str(file)], tokenizer._core, options), [], []
        while True:
            begun = time.process_time()
            part = encoder.next(1, None)
            if part is None:
                break
            times.append(time.process_time() - begun)
            sizes.append(4 * sum(len(part[name][0]) for name in ("prompt", "chosen", "rejected")))
        runs.append(times)
    if len({len(times) for times in runs}) != 1:
        raise AssertionError("the pieces of a file are always the same")
    encode = [min(times) for times in zip(*runs, strict=True)]
    usual = statistics.median(encode)
    dearest = sorted(range(len(encode)), key=encode.__getitem__)[-blocks(file) :]
    read = sum(encode[i] - usual for i in dearest)
    for i in dearest:
        encode[i] = usual
    return encode, read, sizes


def blocks(file: Path) -> int:
    """How often a file is read from, 2,048 lines at a time."""
    return -(-file.read_bytes().count(b"\n") // 2048)


def played(encode: list[float], read: float, put: list[float], threads: int, block: int) -> float:
    """Seconds until all pieces are put together, by the rules of the desk."""
    ready: deque[int] = deque()
    finished: set[int] = set()
    queued = turn = 0
    reading = putting = False
    free = [(0.0, i) for i in range(threads)]
    heapq.heapify(free)
    events: list[tuple[float, int, str, list[int]]] = []
    idle: list[int] = []
    now, last = 0.0, 0.0
    while turn < len(encode):
        while free and free[0][0] <= now:
            _, thread = heapq.heappop(free)
            ours = []
            while turn + len(ours) in finished:
                ours.append(turn + len(ours))
            low = len(ready) < 4 * threads + 64 and queued - turn < 16 * threads + 128
            if ours and not putting:
                putting = True
                finished.difference_update(ours)
                cost, what = sum(put[i] for i in ours), "put"
            elif low and not reading and queued < len(encode):
                reading = True
                ours = list(range(queued, min(queued + block, len(encode))))
                cost, what = read * len(ours) / len(encode), "read"
            elif ready:
                ours = [ready.popleft()]
                cost, what = encode[ours[0]], "encode"
            else:
                idle.append(thread)
                continue
            heapq.heappush(events, (now + cost + LOCK, thread, what, ours))
        if not events:
            raise AssertionError("all threads left before the end")
        now, thread, what, ours = heapq.heappop(events)
        if what == "put":
            putting, turn = False, ours[-1] + 1
            last = now
        elif what == "read":
            reading, queued = False, ours[-1] + 1
            ready.extend(ours)
        else:
            finished.update(ours)
        heapq.heappush(free, (now, thread))
        if what == "read":
            for other in idle:
                heapq.heappush(free, (now, other))
            idle.clear()
    return last


def measured(file: Path, tokenizer: Tokenizer, threads: int) -> tuple[float, float]:
    """Wall and CPU seconds, the best of several."""
    walls, cpus = [], []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        PairDataset.from_files(file, tokenizer, threads=threads, on_bad="skip")
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(given.tokenizer)
    opened = gzip.open if given.file.suffix == ".gz" else open
    with opened(given.file, "rb") as source, tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        file.write_bytes(source.read() * given.copies)
        encode, read, sizes = pieces(file, tokenizer)
        put = [LOCK + size / BYTES_A_SECOND for size in sizes]
        # A call to this end costs more than a piece: what they cost together is known.
        wall, whole = measured(file, tokenizer, 1)
        scale = max(whole - read - sum(put), 0.0) / sum(encode)
        encode = [seconds * scale for seconds in encode]
        blocks_read = blocks(file)
        block = -(-len(encode) // blocks_read)
        alone = sum(encode) + read + sum(put) + len(encode) * 2 * LOCK
        found = {n: alone / (n * played(encode, read, put, n, block)) for n in THREADS}
        two_wall, two_cpu = measured(file, tokenizer, 2)
    times = (statistics.median(encode), max(encode), read / blocks_read)
    cells = [f"{len(encode):,}", *(f"{seconds * 1e6:.0f}" for seconds in times)]
    cells += [f"{100 * found[n]:.0f} %" for n in THREADS]
    cells += [f"{wall / two_wall:.2f} x wall, {two_cpu / whole:.2f} x CPU"]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {dpo_ext.__version__}"
    row = f"| {date.today()} | {machine} | {' | '.join(cells)} |"
    head = "| date | machine | pieces | median us | longest us | us a block read | "
    head += " | ".join(f"{n} threads, predicted" for n in THREADS) + " | 2 threads, measured |"
    print(head, "|" + " --- |" * (head.count("|") - 1), row, sep="\n")
    if given.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as results:
            results.write(f"\n{head}\n|{' --- |' * (head.count('|') - 1)}\n{row}\n")


if __name__ == "__main__":
    main()
