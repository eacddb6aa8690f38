"""The same call gives the same bits, run after run: on one thread and on several, beside other work, in memory that was
kept and in pages that are new. A thousand runs here, a hundred thousand in `make deep`.
"""

import contextlib
import ctypes
import itertools
import mmap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.sampled import WHOLE

from dpo_ext import _core
from dpo_ext.torch import ScoreTable, linear_sequence_logps, sequence_logps
from dpo_ext.torch.logps import scratch

ROWS, VOCABULARIES = 96, (1, 33, 1009, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RUNS = 100_000 if WHOLE else 1_000
MADV_DONTNEED = 4


def table_of(rows, V, generator):
    return ScoreTable(
        logit_rows=torch.randperm(rows, generator=generator),
        targets=torch.randint(V, (rows,), generator=generator, dtype=torch.int32),
        seq_offsets=torch.arange(0, rows + 1, rows // 4, dtype=torch.int32),
    )


class Case:
    """Log-probs and their gradient of one matrix of logits."""

    def __init__(self, V, dtype):
        generator = torch.Generator().manual_seed(V)
        self.logits = (torch.randn(ROWS, V, generator=generator) * 4).to(dtype)
        self.table = table_of(ROWS, V, generator)
        self.upstream = torch.randn(2, 2, generator=generator)

    def run(self):
        logits = self.logits.detach().requires_grad_()
        logps = sequence_logps(logits, self.table)
        (grad,) = torch.autograd.grad(logps, logits, self.upstream)
        return logps.detach(), grad

    def exact(self):
        logits = self.logits.double().requires_grad_()
        table = self.table
        tokens = logits.log_softmax(-1)[table.logit_rows, table.targets.long()]
        logps = tokens.view(4, -1).sum(1).view(-1, 2)
        (grad,) = torch.autograd.grad(logps, logits, self.upstream.double())
        return logps.detach(), grad


def bits(tensors):
    return [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


@contextlib.contextmanager
def beside_other_work():
    """A thread that multiplies, takes memory and gives it back, until the end."""
    stop = threading.Event()

    def work():
        while not stop.is_set():
            a = torch.randn(256, 256)
            (a @ a).sum()
            del a
            bytearray(1 << 22)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def behind_a_chunked_head(generator):
    """What leaves memory with the process: a head in chunks, forward and backward."""
    x = torch.randn(64, 16, generator=generator, requires_grad=True)
    w = torch.randn(scratch.HUGE_BYTES // 64, 16, generator=generator, requires_grad=True)
    table = table_of(64, 1000, generator)
    linear_sequence_logps(x, w, table, plan="recompute", chunk_rows=24).sum().backward()


def drop_pages_of_constants():
    """As memory pressure does: the constants of the library come from its file at the next use."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            place, kind, offset, *_, path = [*line.split(), ""][:6]
            # the first alone: a later one has been written to, by the loader
            if path == _core.__file__ and kind == "r--p" and not int(offset, 16):
                first, last = (int(at, 16) for at in place.split("-"))
                at, length = ctypes.c_void_p(first), ctypes.c_size_t(last - first)
                assert libc.madvise(at, length, MADV_DONTNEED) == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_change_from_run_to_run(threads):
    cases = [Case(V, dtype) for V, dtype in itertools.product(VOCABULARIES, DTYPES)]
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(threads)
    try:
        expected = [bits(case.run()) for case in cases]
        with beside_other_work():
            for run in range(RUNS // 3):
                if run % 250 == 0:
                    behind_a_chunked_head(generator)
                if run % 100 == 0:
                    drop_pages_of_constants()
                if run % 50 == 0:
                    scratch._free.clear()
                k = run % len(cases)
                assert bits(cases[k].run()) == expected[k], (run, cases[k].logits.shape)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("V", VOCABULARIES)
def test_bits_do_not_depend_on_threads_and_are_those_of_float64(V):
    case, before = Case(V, torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            found.append(case.run())
    finally:
        torch.set_num_threads(before)
    assert all(bits(f) == bits(found[0]) for f in found)
    (logps, grad), (exact, exact_grad) = found[0], case.exact()
    assert (logps - exact).abs().max() <= 24 * 4e-6
    assert (grad - exact_grad).abs().max() <= 1e-6 * max(1.0, case.upstream.abs().max().item())


def test_large_gradients_are_the_same_in_new_memory_and_in_kept_memory():
    V = scratch.HUGE_BYTES // 4 // ROWS + 1
    case = Case(V, torch.float32)
    expected = [torch.from_numpy(np.copy(t.numpy())) for t in case.run()]
    for run in range(30):
        if run % 3 == 0:
            scratch._free.clear()
        for other in list(scratch._free):  # what lay there before
            other[:] = b"\xff" * len(other)
        with contextlib.suppress(AttributeError):
            for other in list(scratch._free):
                other.madvise(mmap.MADV_FREE)
        found = case.run()
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True)), run
