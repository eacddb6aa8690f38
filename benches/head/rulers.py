"""What the head is held against: its plans as steps, their bytes and flops, and what times them.

The two rulers of a run are a copy (bytes read + written over time) and the plan's own products (the
same calls, chunks and buffers, nothing between). The bound of a plan is the time of its products
plus the bytes of its elementwise steps at the rate of the copy.

Letters: M scored tokens, H hidden, V vocabulary, C rows of a chunk, R rows of hidden states.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ext.torch.logps.head import Head
from dpo_ext.torch.logps.products import add_product, product, wide
from dpo_ext.torch.pairwise import chunks_of_pairs

PRODUCTS = ("logits", "dx", "dw")
KEPT_CHUNKS = 1
"""Chunks whose logits ``recompute`` keeps from forward to backward, the last ones: 6MHV, not 8."""
READS_AND_WRITES = {"fold": 1, "dz": 2}  # passes over a chunk of logits


class Step(NamedTuple):
    """One product (`logits`, `dx`, `dw`) or elementwise step (`fold`, `dz`) of a chunk."""

    kind: str
    rows: slice


class Steps(NamedTuple):
    forward: list[Step]
    backward: list[Step]


def steps(
    plan: str,
    tokens: int,
    chunk_rows: int,
    offsets: Sequence[int] = (),
    kept_chunks: int | None = None,
) -> Steps:
    """What a plan does, chunk by chunk: the one place that says how many products it has.

    ``recompute`` multiplies again what it has not kept (`KEPT_CHUNKS`). ``pairwise`` needs the
    ``offsets`` of the sequences: its chunks are whole pairs, and a pair longer than a chunk is
    folded first and then multiplied again.

    >>> [step.kind for step in steps("recompute", 8, 8, kept_chunks=1).backward]
    ['dz', 'dx', 'dw']
    """

    def pieces(first: int, last: int) -> list[slice]:
        starts = range(first, last, chunk_rows)
        return [slice(start, min(start + chunk_rows, last)) for start in starts]

    def each(chunks: Iterable[slice], kinds: str) -> list[Step]:
        return [Step(kind, chunk) for chunk in chunks for kind in kinds.split()]

    chunks = pieces(0, tokens)
    if plan == "no gradient":
        return Steps(each(chunks, "logits fold"), [])
    if plan == "frozen":
        return Steps(each(chunks, "logits fold dz dx"), [])
    if plan == "recompute":
        cut = len(chunks) - (KEPT_CHUNKS if kept_chunks is None else kept_chunks)
        again, kept = chunks[: max(cut, 0)], chunks[max(cut, 0) :]
        backward = each(kept, "dz dx dw") + each(again, "logits dz dx dw")
        return Steps(each(chunks, "logits fold"), backward)
    if plan == "pairwise":
        forward = []
        for pairs in chunks_of_pairs(offsets, chunk_rows):
            cut = pieces(offsets[2 * pairs.start], offsets[2 * pairs.stop])
            if len(cut) == 1:
                forward += each(cut, "logits fold dz dx dw")
            else:
                forward += each(cut, "logits fold") + each(cut, "logits dz dx dw")
        return Steps(forward, [])
    raise ValueError(f"no plan {plan!r}")


def flops(of: Iterable[Step], hidden: int, vocabulary: int) -> int:
    """Multiplications and additions of the products: 2 rows H V each."""
    rows = sum(step.rows.stop - step.rows.start for step in of if step.kind in PRODUCTS)
    return 2 * rows * hidden * vocabulary


def logit_bytes(of: Iterable[Step], vocabulary: int, itemsize: int) -> int:
    """Bytes of the elementwise steps: a fold reads its logits, dz reads and writes them."""
    return sum(
        READS_AND_WRITES.get(kind, 0) * (rows.stop - rows.start) * vocabulary * itemsize
        for kind, rows in of
    )


def other_bytes(
    plan: str, tokens: int, rows: int, hidden: int, vocabulary: int, itemsize: int
) -> int:
    """Bytes that the plan must move besides, which no bound counts: they explain a miss.

    Rows of hidden states read and written by each gather, float32 dX to the hidden dtype and to its
    rows, zeros of the rows that are not scored, float32 dW rounded to the weight's dtype, and what
    was made before its factor was known multiplied by it: dW of half width while it is rounded.
    """
    gathers = {"no gradient": 1, "frozen": 1, "pairwise": 1, "recompute": 2}[plan]
    total = gathers * 2 * tokens * hidden * itemsize
    if plan == "no gradient":
        return total
    total += tokens * hidden * (4 + itemsize) + (rows - tokens) * hidden * itemsize
    if plan in ("frozen", "pairwise"):  # kept unscaled, then scaled and put in place
        total += 2 * 2 * tokens * hidden * itemsize
    if plan == "pairwise" and itemsize == 4:
        total += 2 * 4 * vocabulary * hidden
    if plan != "frozen" and itemsize < 4:
        total += vocabulary * hidden * (4 + itemsize)
    return total


def documented_bytes(
    plan: str, tokens: int, chunk_rows: int, hidden: int, vocabulary: int, itemsize: int
) -> int:
    """What the documentation allows: one chunk of logits, float32 dW, dX."""
    total = min(chunk_rows, tokens) * vocabulary * itemsize
    if plan == "no gradient":
        return total
    return total + tokens * hidden * itemsize + (plan != "frozen") * 4 * hidden * vocabulary


def bound_ms(products_ms: float, elementwise_bytes: int, copy_gbps: float) -> float:
    """Time of the products plus the elementwise bytes at the rate of the copy."""
    return products_ms + elementwise_bytes / copy_gbps / 1e6


class Products:
    """The cuBLAS calls of a plan on its own chunks and buffers, with nothing between.

    What is multiplied are the head's own numbers, ``dz`` (C, V) the gradient of its first chunk:
    the power that a product draws, and so its rate, depends on them.
    """

    def __init__(self, head: Head, x: Tensor, weight: Tensor, dz: Tensor) -> None:
        self.head, self.x, self.weight, self.dz = head, x, weight, dz
        self.scratch = head.scratch(weight, len(x))
        self._dw: Tensor | None = None

    def run(self, of: Iterable[Step]) -> None:
        first = True
        for kind, rows in of:
            x = self.x[rows]
            if kind == "logits":
                self.head.logits(x, self.weight, None, self.scratch)
            elif kind == "dx":
                product(self.dz[: len(x)], self.weight)
            elif kind == "dw":
                add_product(self.dw, self.dz[: len(x)], x, first=first)
                first = False

    @property
    def dw(self) -> Tensor:
        """(V, H) accumulator, made when a plan first needs it."""
        if self._dw is None:
            self._dw = torch.zeros_like(self.weight, dtype=wide(self.head.dtype))
        return self._dw


class Job(NamedTuple):
    """What is timed: ``backward`` gets what ``forward`` gave, and nothing where it is None."""

    name: str
    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None


class Times(NamedTuple):
    """Milliseconds of each call."""

    forward: list[float]
    backward: list[float]

    @property
    def both(self) -> list[float]:
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


class Spread(NamedTuple):
    median: float
    p10: float
    p90: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return Spread(*[*values] * 3)
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return Spread(statistics.median(values), deciles[0], deciles[8])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return (end - start) * 1e3
    return start.elapsed_time(end)


def take_turns(
    jobs: Sequence[Job], device: torch.device, seconds: float, least: int = 30, warm_up: int = 1
) -> dict[str, Times]:
    """Times of every job; in each round each has one turn, and another one begins.

    Stops after ``least`` rounds and one second, whichever is later; after ``seconds`` it stops all
    the same, but not before 3 rounds.
    """
    times = {job.name: Times([], []) for job in jobs}
    began, done = time.monotonic(), -warm_up
    while True:
        spent = time.monotonic() - began
        if (done >= least and spent >= 1.0) or (done >= 3 and spent >= seconds):
            return times
        shift = max(done, 0) % len(jobs)
        marks = []
        for job in [*jobs[shift:], *jobs[:shift]]:
            start = _mark(device)
            made = job.forward()
            middle = _mark(device)
            if job.backward is not None:
                job.backward(made)
            marks.append((job.name, start, middle, _mark(device)))
            del made
        synchronize(device)
        if done == -1:
            began = time.monotonic()
        if done >= 0:
            for name, start, middle, end in marks:
                times[name].forward.append(_milliseconds(start, middle))
                times[name].backward.append(_milliseconds(middle, end))
        done += 1


def peaks(job: Job, device: torch.device) -> tuple[int, int] | None:
    """Most bytes above the start during forward and backward; None where none are counted."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    made = job.forward()
    torch.cuda.synchronize(device)
    forward = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.reset_peak_memory_stats(device)
    if job.backward is not None:
        job.backward(made)
    torch.cuda.synchronize(device)
    return forward, torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int:
    """What a new tensor may take; on the host no limit is kept."""
    if device.type != "cuda":
        return 1 << 62
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class Copy:
    """The ruler of bytes: one buffer copied into another."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.source = torch.empty(size, dtype=torch.uint8, device=device).random_()
        self.target = torch.empty_like(self.source)
        self.bytes = 2 * size
        self.job = Job("copy", lambda: self.target.copy_(self.source))

    def gbps(self, times: Times) -> float:
        return self.bytes / statistics.median(times.forward) / 1e6
