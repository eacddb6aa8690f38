"""How fast are log-probs of given logits on the CPU, beside what else computes them?

Peers: `log_softmax` and `gather`, `F.cross_entropy`, torch.compile of it, and TRL's
`selective_log_softmax` where TRL is installed, each in float32 (half-width logits upcast, as a
trainer's are). Verifies values and gradients against float64 first; then forward + backward of each
in one process, taking turns, in the process's own time (system time for page faults included). The
logits are those of a model: no leaf, so that a gradient may be written over them.

Each dtype runs with three kinds of memory, in processes of their own: glibc's default, which takes
new pages for every large tensor; `huge`, torch's switch for huge pages; and `kept`, where memory
stays with the process, as with jemalloc. Rulers of the same bytes stand beside: two reads and a
write into memory that is mapped already (a new gradient), or a read and a multiplication in place.

With `--gate` the exit code is 1 if a way of ours takes longer than a peer that runs eagerly, or
more memory. `--record` appends the rows to benches/RESULTS.md.

    python benches/logps.py [--record] [--gate] [--rows 192] [--vocabulary 128256] [--threads 1]
                            [--dtype float32 ...] [--memory default ...]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from dpo_ext.torch import ScoreTable, sequence_logps

REPEATS, WARM_UP = 15, 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEPT = "mmap_threshold=4000000000", "trim_threshold=8000000000", "hugetlb=1"
MEMORY = {
    "default": {},
    "huge": {"THP_MEM_ALLOC_ENABLE": "1"},
    "kept": {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}" for name in KEPT)},
}
COMPILED = "torch.compile(cross_entropy)"
OURS = {"new gradient": {}, "in place": {"inplace_grad": True}}
Way = Callable[[Tensor, ScoreTable], Tensor]


class Logits(torch.autograd.Function):
    """Memory as the output of a model: what its gradient is taken by is a number elsewhere."""

    @staticmethod
    def forward(ctx: object, leaf: Tensor, memory: Tensor) -> Tensor:
        return torch.empty(0, dtype=memory.dtype).set_(
            memory.untyped_storage(), 0, memory.shape, memory.stride()
        )

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, None]:
        Logits.grad = grad
        return None, None

    grad: Tensor | None = None


def by_log_softmax(logits: Tensor, table: ScoreTable) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, table.targets.long()[:, None])[:, 0]


def by_cross_entropy(logits: Tensor, table: ScoreTable) -> Tensor:
    return -F.cross_entropy(logits.float(), table.targets.long(), reduction="none")


def ways() -> Iterator[tuple[str, Way]]:
    def summed(tokens: Way) -> Way:
        def sums(logits: Tensor, table: ScoreTable) -> Tensor:
            return tokens(logits, table).view(table.n_sequences, -1).sum(1).view(-1, 2)

        return sums

    for name, how in OURS.items():
        yield name, lambda logits, table, how=how: sequence_logps(logits, table, **how)
    yield "log_softmax + gather", summed(by_log_softmax)
    yield "F.cross_entropy", summed(by_cross_entropy)
    yield COMPILED, summed(torch.compile(by_cross_entropy))
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError:
        return
    yield (
        "TRL selective_log_softmax",
        summed(lambda logits, table: selective_log_softmax(logits.float(), table.targets.long())),
    )


def step(way: Way, memory: Tensor, table: ScoreTable, upstream: Tensor) -> float:
    """Seconds of one forward and backward pass over the logits that lie in `memory`."""
    logits = Logits.apply(torch.zeros((), requires_grad=True), memory)
    start = time.process_time()
    way(logits, table).backward(upstream)
    took = time.process_time() - start
    Logits.grad = None
    return took


def verify(way: Way, values: Tensor, table: ScoreTable, upstream: Tensor) -> None:
    """Log-probs and, of eight rows, the gradient, against float64."""
    exact = values.double().log_softmax(-1).gather(1, table.targets.long()[:, None])
    exact = exact.view(table.n_sequences, -1).sum(1).view(-1, 2)
    logits = Logits.apply(torch.zeros((), requires_grad=True), values.clone())
    logps = way(logits, table)
    torch.testing.assert_close(logps.double(), exact, rtol=2e-6, atol=1e-3)
    logps.backward(upstream)
    sample = values[:8].double()
    expected = -sample.softmax(-1)
    expected[range(8), table.targets[:8].long()] += 1
    allowed = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[values.dtype]
    assert Logits.grad is not None
    off = (Logits.grad[:8].double() - expected * upstream[0, 0]).abs().max().item()
    assert off <= allowed, off
    Logits.grad = None


def rulers(values: Tensor) -> dict[str, float]:
    """Milliseconds that the memory of the logits allows, in memory that is mapped."""
    words = torch.ones(values.numel() * values.dtype.itemsize // 4)
    other = words.clone()
    read, copy, scale = words.view(torch.int32), other.copy_, words.mul_
    took = {"read": read.max, "copy": lambda: copy(words), "scale": lambda: scale(1.0)}
    median = {}
    for name, call in took.items():
        turns = []
        for _ in range(REPEATS):
            start = time.process_time()
            call()
            turns.append((time.process_time() - start) * 1e3)
        median[name] = statistics.median(turns)
    return {
        "new gradient": median["read"] + median["copy"],
        "in place": median["read"] + median["scale"],
    }


def peak(way: Way, scratch: Tensor, table: ScoreTable, upstream: Tensor) -> float:
    """Megabytes that one pass adds to what the process holds, at most."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew here
    before = _kilobytes("VmRSS")
    step(way, scratch, table, upstream)
    return (_kilobytes("VmHWM") - before) / 1e3


def _kilobytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def measure(dtype: torch.dtype, rows: int, vocabulary: int) -> dict:
    """Milliseconds of each turn of each way, with megabytes of its first pass, and the rulers."""
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)
    table = ScoreTable(
        logit_rows=torch.arange(rows),
        targets=torch.randint(0, vocabulary, (rows,), generator=generator, dtype=torch.int32),
        seq_offsets=torch.arange(0, rows + 1, rows // 2, dtype=torch.int32),
    )
    upstream, scratch = torch.tensor([[0.5, -1.5]]), values.clone()
    found = {"rulers": rulers(values), "ms": {}, "MB": {}}
    named = dict(ways())
    small = ScoreTable(
        logit_rows=table.logit_rows[:8],
        targets=table.targets[:8],
        seq_offsets=torch.tensor([0, 4, 8], dtype=torch.int32),
    )
    for name, way in named.items():
        step(way, scratch[:8].clone(), small, upstream)  # loads what there is to load
        found["MB"][name] = peak(way, scratch.copy_(values), table, upstream)
        verify(way, values, table, upstream)
        found["ms"][name] = []
    for repeat in range(REPEATS + WARM_UP):
        for name, way in named.items():
            took = step(way, scratch.copy_(values), table, upstream)
            if repeat >= WARM_UP:
                found["ms"][name].append(took * 1e3)
    return found


def in_child(dtype: str, memory: str, arguments: argparse.Namespace) -> dict:
    """`measure` in a process whose allocator is told by its environment."""
    command = [sys.executable, __file__, "--one", dtype]
    for name in ("rows", "vocabulary", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, **MEMORY[memory]}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Row(NamedTuple):
    """One way of ours under one dtype and one kind of memory, beside the peers."""

    way: str
    dtype: str
    memory: str
    found: dict

    def took(self, name: str) -> float:
        return statistics.median(self.found["ms"][name])

    def peers(self) -> list[str]:
        """From the fastest."""
        return sorted((name for name in self.found["ms"] if name not in OURS), key=self.took)

    def ratio(self, peer: str, quantile: float = 0.5) -> float:
        """The peer's time over ours, of turns one beside the other."""
        turns = zip(self.found["ms"][peer], self.found["ms"][self.way], strict=True)
        return sorted(theirs / ours for theirs, ours in turns)[int(REPEATS * quantile)]

    def losses(self) -> list[str]:
        """Eager peers that are faster in three turns of four, or leaner."""
        eager = [name for name in self.peers() if name != COMPILED]
        slower = [f"slower than {n}" for n in eager if self.ratio(n, 0.75) < 1]
        # Where memory is kept, what a way takes shows only if no earlier one took as much.
        leanest = min(self.found["MB"][name] for name in eager)
        more = self.memory != "kept" and self.found["MB"][self.way] > leanest + 4
        return [*slower, *([f"takes more than {leanest:.0f} MB"] if more else [])]

    def __str__(self) -> str:
        share = self.found["rulers"][self.way] / self.took(self.way)
        beside = ", ".join(f"{n} {self.took(n):.0f} ({self.ratio(n):.1f}x)" for n in self.peers())
        return (
            f"{self.dtype:<9} {self.memory:<8} {self.way:<13} {self.took(self.way):6.1f} ms, "
            f"{share:4.0%} of the ruler, +{self.found['MB'][self.way]:.0f} MB; {beside}"
        )

    def cells(self, arguments: argparse.Namespace) -> list[str]:
        ours, first = self.found["ms"][self.way], self.peers()[0]
        what = "sequence_logps" + (", inplace_grad" if OURS[self.way] else "")
        ruler = self.found["rulers"][self.way]
        others = ", ".join(f"{name} {self.took(name):.1f} ms" for name in self.peers())
        command = f"python benches/logps.py --record --rows {arguments.rows}"
        command += f" --vocabulary {arguments.vocabulary} --threads {arguments.threads}"
        return [
            str(date.today()),
            commit(),
            f"{device()}, torch {torch.__version__}, Python {sys.version.split()[0]}",
            f"{what}, {arguments.rows} x {arguments.vocabulary} {self.dtype}, forward + backward, "
            f"{arguments.threads} thread(s), memory {self.memory}, peak "
            f"+{self.found['MB'][self.way]:.0f} MB; ruler {ruler:.1f} ms",
            f"{self.took(self.way):.1f} ms ({min(ours):.1f} to {max(ours):.1f})",
            others,
            f"{self.ratio(first):.1f}x faster than {first}",
            f"`{command}`",
        ]


def device() -> str:
    """What the times are of: the processor, what torch uses of it, and how many there are."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    known = ("avx512_bf16", "amx_bf16", "avx512f", "avx2")
    flags = [flag for flag in known if f" {flag}" in info]
    return f"{(named or ['unknown CPU'])[0]} ({' '.join(flags)}), {os.cpu_count()} CPUs"


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--gate", action="store_true", help="fail where an eager peer wins")
    parser.add_argument("--rows", type=int, default=192, help="an even number of at least 8")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--memory", nargs="+", choices=MEMORY, default=list(MEMORY))
    parser.add_argument("--one", choices=DTYPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(json.dumps(measure(DTYPES[arguments.one], arguments.rows, arguments.vocabulary)))
        return 0
    rows, lost = [], []
    for dtype in arguments.dtype:
        for memory in arguments.memory:
            found = in_child(dtype, memory, arguments)
            for way in OURS:
                row = Row(way, dtype, memory, found)
                print(row, flush=True)
                rows.append(row)
                lost += [f"{dtype}, memory {memory}, {way}: {loss}" for loss in row.losses()]
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(f"| {' | '.join(row.cells(arguments))} |\n" for row in rows)
    for loss in lost:
        print(f"LOST {loss}")
    return 1 if arguments.gate and lost else 0


if __name__ == "__main__":
    sys.exit(main())
